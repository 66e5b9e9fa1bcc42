"""Training in stages: a method that starts exactly where a LoRA has ended (section 6.6 of the RandLoRA paper)."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from randlora_pl.adapters.adapter_file import AdapterFile
from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.injection import InjectionReport, inject
from randlora_pl.adapters.methods.lora import LoRA, LoRADelta
from randlora_pl.adapters.methods.nested import Together, TogetherDelta
from randlora_pl.adapters.methods.randlora import LedRandLoRADelta, RandLoRA
from randlora_pl.adapters.operations import detach
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.save_load import place_adapter, read_adapter
from randlora_pl.adapters.select import choose
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import is_own

Form = Literal["beside", "absorbed"]
"""Place of the LoRA in the method that refines it, see `refine`."""


@dataclass(frozen=True)
class Start:
    """The LoRA that a run starts from, and its place, see `refine`."""

    file: AdapterFile
    form: Form = "beside"


def refine(
    model: nn.Module,
    lora: AdapterFile | str | os.PathLike[str],
    adapter: Adapter,
    form: Form = "beside",
    targets: list[str] | None = None,
) -> InjectionReport:
    """Inject a method that starts with the outputs of a trained LoRA.

    Examples:
        >>> report = refine(model, "runs/lora/adapter", RandLoRA(rank=12))
        >>> report.adapter.method()
        'Together'

    Args:
        model: Base model, with the weights that the LoRA was trained on. If an error is raised, load it again.
        lora: Folder or file of the LoRA, or what `read_adapter` returned.
        adapter: RandLoRA, for instance. A `Together` whose first part has the LoRA's options is taken as it is.
        form: ``beside`` keeps the LoRA as the first part of a `Together`, and the method starts at zero; both train.
            ``absorbed`` makes it a value of RandLoRA's own lambda and gamma (``lead``), which alone train.
        targets: Layers to adapt, which must be the LoRA's. Default: these.

    Raises:
        UserError: The file has another method or does not fit the model, or the method cannot start from it.
    """
    file = lora if isinstance(lora, AdapterFile) else read_adapter(lora)
    adapter = make_next_stage(file.adapter, file.layers, adapter, form, str(file.path))
    if file.trained or file.kept:
        name = [*(file.trained or []), *file.kept][0]
        raise UserError(
            f"{file.path} also changes the model's own {name}, which no stage takes over. Train a LoRA without it."
        )
    chosen = file.targets if targets is None else targets
    try:
        place_adapter(model, file)
    except UserError as error:
        hint = "Remove --model.name, --model.pretrained and --seed_everything: the LoRA's own are the default."
        raise UserError(error.what, hint) from error
    updates = {path: each for path, each in model.named_modules() if isinstance(each, LoRADelta)}
    detach(model)
    check_layers(file.layers, model, adapter, chosen, str(file.path))
    report = inject(model, adapter, chosen)
    for path, update in updates.items():
        own = model.get_submodule(path)
        with torch.no_grad():
            if isinstance(own, LedRandLoRADelta):
                own.absorb(*update.factors())
                continue
            first = own.parts[0] if isinstance(own, TogetherDelta) else own
            for name, value in update.named_parameters():
                first.get_parameter(name).copy_(value)
    place = "the first part" if form == "beside" else "absorbed"
    report.notes.append(f"starts where the LoRA {file.path} has ended, which is {place}")
    return report


def make_next_stage(
    lora: Adapter, layers: Mapping[str, Sequence[int]], adapter: Adapter, form: Form, where: str
) -> Adapter:
    """Return the method of the next stage: a `Together` with the LoRA, or a RandLoRA that has room for it.

    Args:
        lora: Method of the first stage, as an injection returns it.
        layers: Names and shapes of its layers.
        adapter: Method of the next stage.
        form: Place of the LoRA, see `refine`.
        where: The LoRA, for messages.

    Raises:
        UserError: The first method is not LoRA, or the next one cannot contain it.
    """
    if form not in get_args(Form):
        raise UserError(f"form is {form!r}: choose {' or '.join(get_args(Form))}.")
    if not isinstance(lora, LoRA) or is_own(type(lora)):  # an own class may compute something else
        raise UserError(
            f"{where} is {lora.method()}, and a stage can only start from LoRA. Train one first: randlora-pl fit "
            "--config CONFIG --model.adapter LoRA"
        )
    if adapter.trains_base:
        raise UserError(
            f"{adapter.method()} trains the model's own tensors: a stage adds to a LoRA. Set --model.adapter RandLoRA."
        )
    if adapter.qkv != lora.qkv:
        raise UserError(
            f"{where} has qkv {lora.qkv}, and {adapter.method()} has {adapter.qkv}: add --model.adapter.qkv {lora.qkv}."
        )
    if form == "absorbed" and not isinstance(adapter, RandLoRA):
        raise UserError(
            f"{adapter.method()} cannot absorb a LoRA: set --model.adapter RandLoRA, or --from-form beside (in a sweep "
            "form: beside)."
        )
    if form == "beside" and isinstance(adapter, Together):
        first, wrong = adapter.parts[0], ""
        if isinstance(first, LoRA):  # its seed, its dropout and what affects training alone are free
            here, there = (each.replace(seed=None, dropout=0).identity()["options"] for each in (first, lora))
            differ = (f"{name} {here[name]}, not {value}" for name, value in there.items() if here[name] != value)
            wrong = " and ".join(differ)
        else:
            wrong = f"method {first.method()}, not LoRA"
        if wrong:
            raise UserError(
                f"the first part of Together has {wrong}, as {where} has. Give this part the LoRA's options, or set "
                "--model.adapter RandLoRA."
            )
        return adapter
    if form == "beside":
        return Together([lora.replace(seed=None), adapter.replace(seed=None)], seed=adapter.seed)
    ranks = {f"^{re.escape(name)}": lora.rank_of(WeightShape(name, *shape)) for name, shape in layers.items()}
    number = set(ranks.values())
    return adapter.replace(lead=number.pop() if len(number) == 1 else ranks)


def check_layers(
    layers: Collection[str], model: nn.Module, adapter: Adapter, targets: list[str] | None, where: str
) -> None:
    """Refuse a method that would adapt other weights than a LoRA did.

    Args:
        layers: Names of the LoRA's layers.
        model: Base model.
        adapter: Method of the next stage.
        targets: Its layers.
        where: The LoRA, for messages.

    Raises:
        UserError: The layers differ.
    """
    selection = choose(model, targets, adapter.qkv == "split", adapter)
    chosen = {site.shape.layer for site in selection.sites}
    if other := sorted(chosen ^ set(layers)):
        if reason := selection.skipped.get(other[0]):
            raise UserError(f"{where} adapts {other[0]}, which {adapter.method()} skips: {reason}. Lower its rank.")
        how = "is adapted by the LoRA alone" if other[0] in layers else "is not adapted by the LoRA"
        raise UserError(
            f"{where} adapts {len(layers)} layers, the targets select {len(chosen)} ({other[0]} {how}). "
            "Remove --model.targets: the LoRA's own are the default."
        )
