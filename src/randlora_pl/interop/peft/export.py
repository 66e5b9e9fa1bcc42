"""Export of adapters for ``PeftModel.from_pretrained``.

Nothing is approximated: adapters that PEFT cannot represent are refused.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters import Adapter, AdapterFile, adapted_layers, read_adapter
from randlora_pl.adapters.base import FactoredDelta
from randlora_pl.adapters.input_dependent import check_fixed
from randlora_pl.adapters.layers.adapted import RowBlocks
from randlora_pl.adapters.peft_form import Part, PeftForm
from randlora_pl.adapters.targets.sites import is_packed_linear
from randlora_pl.adapters.weights import WeightShape, exact_pattern
from randlora_pl.interop.base_model import Base, load_base, wrap_model
from randlora_pl.interop.foreign.adapter import plain_convolution
from randlora_pl.interop.peft.files import PeftAdapter, base_name, written
from randlora_pl.interop.peft.verify import Difference, LogitsOnly, difference, installed
from randlora_pl.interop.prompts import check_no_prompts
from randlora_pl.interop.updates import adapted
from randlora_pl.models import ModelIdentity
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.weights_files import without_local_paths


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    ``difference`` is the largest one to PEFT's outputs (of merged weights if the inputs are unknown); None if it was
    not compared, for the reason ``why``. ``classifier`` is in PEFT's file; ``head`` is True if one is in another file.
    """

    difference: Difference | None
    why: str = ""
    classifier: str | None = None
    head: bool = False
    identity: ModelIdentity | None = None


def export_peft(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    peft_type: str | None = None,
) -> Exported:
    """Write an adapter as a folder for ``PeftModel.from_pretrained``, verified before it gets its final name.

    Args:
        path: Adapter folder or file.
        folder: Output folder; an older PEFT adapter is replaced.
        model: Base model without an adapter; it is not changed. Default: the adapter's base model.
        peft_type: ``ADALORA`` keeps an AdaLoRA what it is. By default it becomes a LoRA of the ranks that are kept.

    Raises:
        UserError: PEFT cannot represent this adapter or gives other outputs, or the base model cannot be built.
    """
    file = read_adapter(path)
    own = type(file.adapter).to_peft is not Adapter.to_peft and file.adapter.peft
    if peft_type is not None and not (own and peft_type == own.name):
        raise UserError(f"{path}: peft_type is {peft_type}. Use ADALORA with an AdaLoRA, and leave it out otherwise.")
    check_no_prompts(file, "PEFT has no place for them. Predict and serve take the adapter")
    factored = file.adapter.exports_factors
    if not factored:
        to_peft(file, set(), None, peft_type)  # check the method before a large model is built
    base, named = None if model is None else wrap_model(model), file.config.get("base_model", {})
    if base is None and named.get("library") and named.get("name"):
        base = load_base(file)
    modules = base.model.named_modules() if base is not None else ()
    attention = {path for path, module in modules if isinstance(module, nn.MultiheadAttention)}
    made = None
    if factored:
        if base is None:
            raise refusal(file, "it does not name its base model", "pass it: export_peft(ADAPTER, DIR, model=model)")
        made = adapted(base, file)
        adapter = to_peft(file, attention, base.part, updated=made.part)
    else:
        known, whole = (None, None) if base is None else (attention, base.part)
        adapter = to_peft(file, known, whole, peft_type)
    name = None
    if base is not None and (name := _classifier(file, base)):
        weight = file.extra["head"].float()
        head = {f"{name}.weight": weight, f"{name}.bias": weight.new_zeros(len(weight))}
        config = {**adapter.config, "modules_to_save": [*(adapter.config["modules_to_save"] or []), name]}
        adapter = replace(adapter, config=config, tensors={**adapter.tensors, **head})
    else:
        adapter = replace(adapter, head=file.extra)
    identity = None if base is None else base.identity
    with written(adapter, Path(folder)) as part:
        if base is None:
            return Exported(None, "the adapter does not name its base model", None, bool(adapter.head))
        if not installed():
            return Exported(None, "peft is not installed", name, bool(adapter.head), identity)
        made = adapted(base, file) if made is None else made
        with _refusing(file):
            found = difference(made.model, base, part, LogitsOnly(file.extra["head"]) if name else None)
        return Exported(found, "", name, bool(adapter.head), identity)


def _classifier(file: AdapterFile, base: Base) -> str | None:
    """Return the timm layer that can hold an adapter's linear head, or None."""
    if file.metadata.get("task") != "LinearHeadTask" or base.identity is None or base.identity.library != "timm":
        return None
    model: Any = base.copy().model
    name = model.default_cfg.get("classifier")
    model.reset_classifier(len(file.extra["head"]))
    fits = isinstance(name, str) and isinstance(layer := model.get_submodule(name), nn.Linear)
    return name if fits and layer.weight.shape == file.extra["head"].shape else None


def _parts(file: AdapterFile) -> list[Part]:
    """Return the adapted weights of a file in its order."""
    parts = []
    for name, shape in file.layers.items():
        owner, _, last = name.rpartition(".")
        whole = any(tensor.startswith(f"{name}.delta.") for tensor in file.tensors)
        path = name if whole else owner
        block = None if whole or last == "in_proj" else last
        start = f"{path}.delta.{block}." if block else f"{path}.delta."
        own = {
            key.removeprefix(start): value.float() if value.is_floating_point() else value
            for key, value in file.tensors.items()
            if key.startswith(start)
        }
        if not own:
            raise UserError(f"{file.path} has no tensors of the layer {name}; copy it again.")
        packed = not whole and not (block and is_packed_linear(path))
        parts.append(Part(WeightShape(name, *shape[:2]), path, block, packed, own))
    return parts


def to_peft(
    file: AdapterFile,
    attention: set[str] | None = None,
    model: nn.Module | None = None,
    peft_type: str | None = None,
    updated: nn.Module | None = None,
) -> PeftAdapter:
    """Convert an adapter to PEFT's form.

    Args:
        file: Adapter of a method that PEFT has, or that has another method in PEFT (`Adapter.in_peft`).
        attention: Paths of the model's ``nn.MultiheadAttention`` modules. If None, layers that may belong to one are
            refused, because PEFT would never call them.
        model: Base model, for modules trained completely beside the adapter.
        peft_type: See `export_peft`.
        updated: Base model with the adapter, not merged, if the method needs the factors of its updates.

    Raises:
        UserError: PEFT has no form with the same outputs; the message has the reason and alternatives.
    """
    check_fixed(file.adapter, file.path)
    if problem := file.adapter.peft_problem():
        raise refusal(file, problem)
    whole = parts = _parts(file)
    if updated is not None:
        parts = _with_factors(parts, updated)
    adapter, parts = (file.adapter, parts) if peft_type is not None else file.adapter.in_peft(parts)
    form = adapter.peft
    assert form is not None
    if read := [part.path for part in parts if _read(part, parts, attention, file)]:
        raise refusal(file, f"nn.MultiheadAttention reads the weight of {read[0]}, which PEFT's updates do not affect")
    if not form.packed and (raw := [part.shape.layer for part in parts if part.packed]):
        raise refusal(file, f"{raw[0]} is a weight of nn.MultiheadAttention, which PEFT adapts with LoRA only")
    if not form.packed and (apart := [part.shape.layer for part in parts if part.block]):
        raise refusal(file, f"{apart[0]} is a block of a packed weight, but PEFT adapts whole weights")
    with _refusing(file):
        config, tensors = adapter.to_peft(parts, file.bases)
        updates = tuple(f"{part.path}.delta." for part in whole)
        beside = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(updates)}
        modules, own = _modules_to_save(beside, {part.path for part in parts}, model)
        if model is not None:
            tensors = _with_kernels(tensors, parts, form, model)
    known = without_local_paths(file.config)
    task = {name: value for name, value in known.get("metadata", {}).items() if name != "training"}
    task["base_model"] = known.get("base_model", {})
    common = {
        "peft_type": form.name,
        "target_modules": exact_pattern(part.path for part in parts),
        "auto_mapping": None,
        "base_model_name_or_path": base_name(file.config.get("base_model", {})),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": modules or None,
        "revision": None,
        "task_type": "CAUSAL_LM" if file.metadata.get("task") == "CausalLMTask" else None,
    }
    return PeftAdapter(common | config, {**tensors, **own}, task=task)


@contextmanager
def _refusing(file: AdapterFile) -> Iterator[None]:
    """Convert an error to a refusal of the whole adapter."""
    try:
        yield
    except UserError as error:
        raise refusal(file, error.what, error.hint) from None


def refusal(file: AdapterFile, why: str, remedy: str = "") -> UserError:
    """Return the error for an adapter that PEFT cannot represent, with alternatives."""
    merged = "`randlora-pl adapter merge` for the merged weights"
    texts = file.config.get("base_model", {}).get("library") == "transformers"
    ways = f"--to lora --rank K for a plain LoRA with its error, or {merged}"
    if texts or file.adapter.trains_base:
        ways = merged
    what = f"{file.path} ({file.adapter.method()}) cannot be a PEFT adapter: {why}."
    return UserError(what, f"{'; or '.join(filter(None, (f'Use {ways}', remedy)))}.", str(file.path))


def _read(part: Part, parts: list[Part], attention: set[str] | None, file: AdapterFile) -> bool:
    """Return True if a layer is the output projection of ``nn.MultiheadAttention``, which reads its weight directly.

    Raises:
        UserError: It cannot be determined.
    """
    owner, _, last = part.path.rpartition(".")
    if last != "out_proj" or part.packed or part.block:
        return False
    if attention is not None:
        return owner in attention
    if any(other.path == owner for other in parts) or file.config.get("base_model", {}).get("library") == "open_clip":
        return True
    raise UserError(
        f"{part.path} may belong to nn.MultiheadAttention, where PEFT's update would have no effect, and {file.path} "
        "does not name its model. Pass the model in Python (randlora_pl.interop.peft.export): "
        "export_peft(ADAPTER, DIR, model=model)"
    )


def _with_factors(parts: list[Part], model: nn.Module) -> list[Part]:
    """Return the weights with the factors of their updates, B (out, k) and A (k, in), in place of what trained."""
    layers, factored = adapted_layers(model), []
    for part in parts:
        delta = layers[part.path].delta
        if isinstance(delta, RowBlocks) and part.block:
            delta = delta.blocks()[part.block]
        assert isinstance(delta, FactoredDelta)
        b, a = delta.factors()
        factored.append(replace(part, tensors={"B": b.contiguous(), "A": a.contiguous()}))
    return factored


def _with_kernels(
    tensors: Mapping[str, Tensor], parts: list[Part], form: PeftForm, model: nn.Module
) -> dict[str, Tensor]:
    """Return PEFT's tensors, all factors as matrices, with four-dimensional factors for convolutions.

    Raises:
        UserError: PEFT cannot represent a convolution.
    """
    found = dict(tensors)
    for part in parts:
        path, layer = part.path, model.get_submodule(part.path)
        if not isinstance(layer, nn.Conv2d):
            continue
        if form.kernels is None:
            raise UserError(f"{path} is a convolution, which PEFT adapts so with LoRA and HiRA only")
        if not plain_convolution(layer):
            raise UserError(f"PEFT's update has no groups, dilation or padding mode for a convolution such as {path}")
        a, b = (f"{path}.{name}" for name in form.kernels)
        found[a] = found[a].view(-1, *layer.weight.shape[1:])
        found[b] = found[b][..., None, None]
    return found


def _modules_to_save(
    own: dict[str, Tensor], adapted: set[str], model: nn.Module | None
) -> tuple[list[str], dict[str, Tensor]]:
    """Return the modules trained completely beside an adapter, and all of their tensors by name, as PEFT stores them.

    ``model`` has the other tensors of modules that were trained partially, as ``own`` has them.

    Raises:
        UserError: PEFT cannot represent a tensor.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in own))
    for module in modules:
        if not module or module in adapted:
            raise UserError(f"{next(n for n in own if n.rpartition('.')[0] == module)} trained beside its updates")
    if model is not None:
        for path, _ in model.named_modules():
            if path not in modules and (other := next((each for each in modules if path.endswith(each)), None)):
                raise UserError(f"it trained the module {other}, and PEFT takes that name for {path} as well")
        whole = {
            f"{path}.{key}": value for path in modules for key, value in model.get_submodule(path).state_dict().items()
        }
        own = whole | own
    return modules, own
