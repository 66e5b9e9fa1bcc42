"""Export of adapters for ``PeftModel.from_pretrained``, verified: PEFT computes the same outputs.

Nothing is approximated: an adapter that PEFT cannot represent is an error.
"""

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, AdapterFile, adapted_layers, layers, merge_and_unload, read_adapter, sites
from randlora_pl.adapters.base import FactoredDelta, Part, PeftForm
from randlora_pl.adapters.methods.lora import of_factors
from randlora_pl.adapters.random_bases import WeightShape, exact_pattern
from randlora_pl.interop import base_model, external, summary
from randlora_pl.interop.peft_import import TENSORS, PeftAdapter, write_peft
from randlora_pl.models import ModelIdentity
from randlora_pl.tasks.restore import task_class
from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.weights_files import without_local_paths

TOLERANCE = 1e-5
"""Tolerance relative to the largest output, or to 1 if that is smaller; `LOST` limits the adapter's lost change."""


def installed() -> bool:
    """Return True if PEFT is installed."""
    return find_spec("peft") is not None


Classifier = tuple[Tensor, Tensor | None]
"""Classifier in PEFT's file that our model does not have: weight (classes, features), and bias (classes) or None."""


class Difference(NamedTuple):
    """Largest difference between our outputs and PEFT's; NaN if a value is not finite.

    ``change`` is the largest change that the adapter makes to the base model's outputs, ``largest`` the largest output,
    or 1, and ``exact`` the largest difference in float64, if float32 was not precise enough.
    """

    gap: float
    change: float
    largest: float
    exact: float | None = None

    @property
    def fits(self) -> bool:
        """True if the difference is rounding, and not a lost small update."""
        return self.gap <= TOLERANCE * self.largest and (self.gap <= base_model.LOST * self.change or not self.change)

    def summary(self) -> str:
        """Return text for the user, after a colon or inside a sentence."""
        if not self.change:
            return f"{self.gap:.1e}; the adapter changes nothing, its outputs equal the base model's"
        changes = f"where the adapter changes the base model's by {self.change:.1e}"
        if self.exact is None:
            return f"{self.gap:.1e}, {changes}"
        return (
            f"{self.exact:.1e} in float64, which counts, {changes}; {self.gap:.1e} in float32 is this model's rounding"
        )


@torch.no_grad()
def difference(
    ours: nn.Module, base: base_model.Base, folder: Path, classifier: Classifier | None = None
) -> Difference:
    """Return the largest difference between our outputs and PEFT's, or of merged weights if inputs are unknown.

    Neither model is changed; if PEFT's file has a classifier, the base model is of timm.

    Raises:
        UserError: PEFT cannot load the adapter or adapts other layers, or the difference is more than rounding, also in
            float64 (deep models round more in float32).
    """
    from peft import PeftModel, get_peft_model_state_dict

    fresh: Any = base.copy().model
    if classifier is not None:
        fresh.reset_classifier(len(classifier[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs: Any = PeftModel.from_pretrained(fresh.eval(), str(folder), torch_device="cpu").eval()
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"PEFT does not load it ({first_line(error)})") from error
        states = get_peft_model_state_dict(theirs, save_embedding_layers=False), load_file(folder / TENSORS)
    shared = ("randlora_A", "randlora_B", "vera_A", "vera_B")  # PEFT up to 0.21 repeats them in every layer
    adapts, saved = (
        {name.removeprefix("base_model.model.") for name in state if not name.endswith(shared)} for state in states
    )
    if others := sorted(adapts ^ saved):
        raise UserError(f"PEFT would adapt other layers, {others[0].rpartition('.lora_')[0] or others[0]} among them")
    ours = ours.eval()
    if base.image_size is None and not base.generates_text:
        plain = base.model.state_dict()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = merge_and_unload(copy.deepcopy(ours)).state_dict(), theirs.merge_and_unload().state_dict()
        first = _furthest([(merged[0][name], merged[1][name], plain[name]) for name in merged[0]])
    else:
        first = _furthest(_outputs((ours, theirs, base.model), base, classifier))
        if not first.fits:
            models = copy.deepcopy(ours).double(), theirs.double(), base.copy().model.double()
            if (again := _furthest(_outputs(models, base, classifier))).fits:
                return again._replace(gap=first.gap, exact=again.gap)
    if not first.fits:
        raise UserError(
            f"PEFT's outputs differ from ours, by up to {first.gap:.1e} (the adapter changes {first.change:.1e})"
        )
    return first


def _outputs(models: Sequence[Any], base: base_model.Base, classifier: Classifier | None) -> list[tuple[Tensor, ...]]:
    """Return the outputs of our model, PEFT's and the base model."""
    ours, theirs, plain = models
    outputs = [base.outputs(model) for model in (ours, theirs.get_base_model(), plain)]
    if classifier is not None:
        (weight, bias), dtype = classifier, outputs[0][0].dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        for own in (outputs[0], outputs[2]):
            own[:] = [nn.functional.linear(features, weight, bias) for features in own]
    return list(zip(*outputs, strict=True))


def _furthest(triples: list[tuple[Tensor, ...]]) -> Difference:
    triples = [triple for triple in triples if triple[0].is_floating_point() and triple[0].numel()]
    if any(not (a.isfinite().all() and b.isfinite().all()) for a, b, _ in triples):
        return Difference(float("nan"), 1.0, 1.0)
    return Difference(
        max(float((a - b).abs().max()) for a, b, _ in triples),
        max(float((a - plain).abs().max()) for a, _, plain in triples),
        max(1.0, *(float(a.abs().max()) for a, _, _ in triples)),
    )


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
) -> Exported:
    """Write an adapter as a folder for ``PeftModel.from_pretrained``, verified before it gets its final name.

    Args:
        path: Adapter folder or file.
        folder: Output folder; an older PEFT adapter is replaced.
        model: Base model without an adapter; it is not changed. Default: the adapter's base model.

    Raises:
        UserError: PEFT cannot represent this adapter or gives other outputs, or the base model cannot be built.
    """
    file = read_adapter(path)
    summary.check_no_prompts(file, "PEFT has no place for them. Predict and serve accept the adapter")
    factored = file.adapter.exports_factors
    if not factored:
        to_peft(file, set())  # check the method before a large model is built
    base, named = None if model is None else base_model.Base(model, model), file.config.get("base_model", {})
    if base is None and named.get("library") and named.get("name"):
        base = base_model.load_base(file)
    modules = base.model.named_modules() if base is not None else ()
    attention = {path for path, module in modules if isinstance(module, nn.MultiheadAttention)}
    if factored and base is None:
        raise refusal(file, "it does not name its base model", "pass it: export_peft(ADAPTER, DIR, model=model)")
    made = None if base is None or not factored else base_model.adapted(base, file)
    known, whole = (None, None) if base is None else (attention, base.part)
    adapter = to_peft(file, known, whole, None if made is None else made.part)
    identity, task = None if base is None else base.identity, task_class(file)
    linear = task is not None and task.adopts == "linear head"
    name = None  # of the timm layer that can hold the linear head
    if base is not None and identity is not None and identity.library == "timm" and linear:
        weight = file.extra["head"].float()
        fresh: Any = base.copy().model
        name = fresh.default_cfg.get("classifier")
        fresh.reset_classifier(len(weight))
        layer = fresh.get_submodule(name) if isinstance(name, str) else None
        name = name if isinstance(layer, nn.Linear) and layer.weight.shape == weight.shape else None
    if name is None:
        adapter = replace(adapter, head=file.extra)
    else:
        head = {f"{name}.weight": weight, f"{name}.bias": weight.new_zeros(len(weight))}
        config = {**adapter.config, "modules_to_save": [*(adapter.config["modules_to_save"] or []), name]}
        adapter = replace(adapter, config=config, tensors={**adapter.tensors, **head})
    with write_peft(adapter, Path(folder)) as part:
        if base is None:
            return Exported(None, "the adapter does not name its base model", None, bool(adapter.head))
        if not installed():
            return Exported(None, "peft is not installed", name, bool(adapter.head), identity)
        made = base_model.adapted(base, file) if made is None else made
        with _refusing(file):
            gap = difference(made.model, base, part, (file.extra["head"], None) if name else None)
        return Exported(gap, "", name, bool(adapter.head), identity)


def _parts(file: AdapterFile, updated: nn.Module | None) -> list[Part]:
    """Return the adapted weights of a file in its order; of an adapted model with the factors of their updates."""
    modules, parts = {} if updated is None else adapted_layers(updated), []
    for name, shape in file.layers.items():
        path, block, tensors = file.update_of(name)
        own = {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}
        if not own:
            raise UserError(f"{file.path} has no tensors of the layer {name}; copy it again.")
        if updated is not None:
            delta = modules[path].delta
            if isinstance(delta, layers.RowBlocks) and block:
                delta = delta.blocks()[block]
            assert isinstance(delta, FactoredDelta)
            b, a = delta.factors()
            own = {"B": b.contiguous(), "A": a.contiguous()}
        packed = path != name and not (block and sites.is_packed_linear(path))
        parts.append(Part(WeightShape(name, *shape[:2]), path, block, packed, own))
    return parts


def to_peft(
    file: AdapterFile,
    attention: set[str] | None = None,
    model: nn.Module | None = None,
    updated: nn.Module | None = None,
) -> PeftAdapter:
    """Convert an adapter to PEFT's form.

    Args:
        file: Adapter of a method that PEFT has, or that has another method in PEFT (`Adapter.in_peft`).
        attention: Paths of the model's ``nn.MultiheadAttention`` modules. If None, layers that may belong to one are
            an error, because PEFT would never call them.
        model: Base model, for modules fully trained alongside the adapter.
        updated: Base model with the adapter, not merged, if the method needs the factors of its updates.

    Raises:
        UserError: PEFT has no form with the same outputs; the message has the reason and alternatives.
    """
    file.adapter.require_matrix("the export to PEFT", file.path)
    if problem := file.adapter.peft_problem():
        raise refusal(file, problem)
    whole = parts = _parts(file, updated)
    adapter: Adapter = file.adapter
    if updated is not None:
        adapter = of_factors(parts, adapter)
    else:
        adapter, parts = adapter.in_peft(parts)
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
        "base_model_name_or_path": base_model.hub_id(file.config.get("base_model", {})),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": modules or None,
        "revision": None,
        "task_type": None if (kind := task_class(file)) is None else kind.peft_type,
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
    ways = f"--to lora --rank K for a plain LoRA with its error, or {merged}"
    if base_model.is_encoder(file) or file.adapter.trains_base:
        ways = merged
    what = f"{file.path} ({file.adapter.method()}) cannot be a PEFT adapter: {why}."
    return UserError(what, f"{'; or '.join(filter(None, (f'Use {ways}', remedy)))}.", str(file.path))


def _read(part: Part, parts: list[Part], attention: set[str] | None, file: AdapterFile) -> bool:
    """Return True if a layer is the output projection of ``nn.MultiheadAttention``, which reads its weight directly."""
    owner, _, last = part.path.rpartition(".")
    if last != "out_proj" or part.packed or part.block:
        return False
    if attention is not None:
        return owner in attention
    if any(other.path == owner for other in parts) or file.config.get("base_model", {}).get("library") == "open_clip":
        return True
    raise UserError(
        f"{part.path} may belong to nn.MultiheadAttention, where PEFT's update would have no effect, and {file.path} "
        "does not name its model. Pass the model in Python (randlora_pl.interop.peft_export): "
        "export_peft(ADAPTER, DIR, model=model)"
    )


def _with_kernels(
    tensors: Mapping[str, Tensor], parts: list[Part], form: PeftForm, model: nn.Module
) -> dict[str, Tensor]:
    """Return PEFT's tensors, all factors as matrices, with four-dimensional factors for convolutions."""
    converted = dict(tensors)
    for part in parts:
        path, layer = part.path, model.get_submodule(part.path)
        if not isinstance(layer, nn.Conv2d):
            continue
        if form.kernels is None:
            raise UserError(f"{path} is a convolution, which PEFT adapts so with LoRA and HiRA only")
        if not external.plain_convolution(layer):
            raise UserError(f"PEFT's update has no groups, dilation or padding mode for a convolution such as {path}")
        a, b = (f"{path}.{name}" for name in form.kernels)
        converted[a] = converted[a].view(-1, *layer.weight.shape[1:])
        converted[b] = converted[b][..., None, None]
    return converted


def _modules_to_save(
    own: dict[str, Tensor], adapted: set[str], model: nn.Module | None
) -> tuple[list[str], dict[str, Tensor]]:
    """Return the modules fully trained alongside an adapter, and all of their tensors by name, as PEFT stores them.

    ``model`` has the other tensors of modules that were trained partially, as ``own`` has them.
    """
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in own))
    for module in modules:
        if not module or module in adapted:
            raise UserError(f"{next(n for n in own if n.rpartition('.')[0] == module)} trained alongside its updates")
    if model is not None:
        for path, _ in model.named_modules():
            if path not in modules and (other := next((each for each in modules if path.endswith(each)), None)):
                raise UserError(f"it trained the module {other}, and PEFT takes that name for {path} as well")
        whole = {
            f"{path}.{key}": value for path in modules for key, value in model.get_submodule(path).state_dict().items()
        }
        own = whole | own
    return modules, own
