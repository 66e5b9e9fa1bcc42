"""Export of adapters for ``PeftModel.from_pretrained``.

Nothing is approximated: adapters that PEFT cannot represent are refused.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from randlora_pl.adapters import AdapterFile, DoRA, LoRA, RandLoRA, VeRA, load_adapter, read_adapter
from randlora_pl.adapters.base import WeightShape
from randlora_pl.adapters.targets.sites import is_packed_linear
from randlora_pl.interop.base_model import Base, load_base, wrap_model
from randlora_pl.interop.peft.convolutions import with_kernels
from randlora_pl.interop.peft.files import PeftAdapter, written
from randlora_pl.interop.peft.modules import modules_to_save
from randlora_pl.interop.peft.tensors import Part, lora_form, randlora_form, vera_form
from randlora_pl.interop.peft.verify import Difference, LogitsOnly, difference, installed
from randlora_pl.models import ModelIdentity
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.weights_files import without_local_paths


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        difference: Largest difference to PEFT's outputs (of merged weights if the inputs are unknown); None if it was
            not compared.
        why: Reason why it was not compared.
        classifier: Name of the classifier in PEFT's file, if any.
        head: True if a head is in a separate file.
        identity: Base model, if the adapter names it.
    """

    difference: Difference | None
    why: str = ""
    classifier: str | None = None
    head: bool = False
    identity: ModelIdentity | None = None


def export_peft(
    path: str | os.PathLike[str], folder: str | os.PathLike[str], *, model: nn.Module | None = None
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
    to_peft(file, set())  # check the method before a large model is built
    base = wrap_model(model) if model is not None else load_base(file) if _names_base(file) else None
    attention = None if base is None else _attention(base.model)
    adapter, name = to_peft(file, attention, None if base is None else base.part), None
    if base is not None:
        paths = [part.path for part in parts_of(file)]
        try:
            tensors = with_kernels(adapter.tensors, paths, base.model, isinstance(file.adapter, LoRA))
        except UserError as error:
            raise refusal(file, error.what, error.hint) from None
        adapter = replace(adapter, tensors=tensors)
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
        made = base.copy()
        load_adapter(made.part, path)
        try:
            found = difference(made.model, base, part, LogitsOnly(file.extra["head"]) if name else None)
        except UserError as error:
            raise refusal(file, error.what, error.hint) from None
        return Exported(found, "", name, bool(adapter.head), identity)


def _names_base(file: AdapterFile) -> bool:
    base = file.config.get("base_model", {})
    return bool(base.get("library") and base.get("name"))


def _attention(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}


def _classifier(file: AdapterFile, base: Base) -> str | None:
    """Return the timm layer that can hold an adapter's linear head, or None."""
    if file.metadata.get("task") != "LinearHeadTask" or base.identity is None or base.identity.library != "timm":
        return None
    model: Any = base.copy().model
    name = model.default_cfg.get("classifier")
    model.reset_classifier(len(file.extra["head"]))
    fits = isinstance(name, str) and isinstance(layer := model.get_submodule(name), nn.Linear)
    return name if fits and layer.weight.shape == file.extra["head"].shape else None


def parts_of(file: AdapterFile) -> list[Part]:
    """Return the adapted weights of a file in its order."""
    return [_part(file, WeightShape(name, *shape[:2])) for name, shape in file.layers.items()]


def _part(file: AdapterFile, shape: WeightShape) -> Part:
    name, (owner, _, last) = shape.layer, shape.layer.rpartition(".")
    whole = any(tensor.startswith(f"{name}.delta.") for tensor in file.tensors)
    path = name if whole else owner
    block = None if whole or last == "in_proj" else last
    start = f"{path}.delta.{block}." if block else f"{path}.delta."
    own = {key.removeprefix(start): value.float() for key, value in file.tensors.items() if key.startswith(start)}
    if not own:
        raise UserError(f"{file.path} has no tensors of the layer {name}; copy it again.")
    return Part(shape, path, block, not whole and not (block and is_packed_linear(path)), own)


def to_peft(file: AdapterFile, attention: set[str] | None = None, model: nn.Module | None = None) -> PeftAdapter:
    """Convert an adapter to PEFT's form.

    Args:
        file: RandLoRA, LoRA, VeRA, or DoRA around LoRA.
        attention: Paths of the model's ``nn.MultiheadAttention`` modules. If None, layers that may belong to one are
            refused, because PEFT would never call them.
        model: Base model, for modules trained completely beside the adapter.

    Raises:
        UserError: PEFT has no form with the same outputs; the message has the reason and alternatives.
    """
    adapter = file.adapter
    if not isinstance(adapter, RandLoRA | LoRA | VeRA | DoRA):
        raise refusal(file, "PEFT does not have this method")
    if isinstance(adapter, DoRA) and not isinstance(adapter.inner, LoRA):
        raise refusal(file, f"PEFT's DoRA wraps LoRA only, this one wraps {adapter.inner.method()}")
    parts = parts_of(file)
    if read := [part.path for part in parts if _read(part, parts, attention, file)]:
        raise refusal(file, f"nn.MultiheadAttention reads the weight of {read[0]}, which PEFT's updates do not affect")
    lora = isinstance(adapter, LoRA)
    if not lora and (raw := [part.shape.layer for part in parts if part.packed]):
        raise refusal(file, f"{raw[0]} is a weight of nn.MultiheadAttention, which PEFT adapts with LoRA only")
    if not lora and (apart := [part.shape.layer for part in parts if part.block]):
        raise refusal(file, f"{apart[0]} is a block of a packed weight, but PEFT adapts whole weights")
    try:
        if isinstance(adapter, RandLoRA):
            config, tensors = randlora_form(file, adapter, parts)
        elif isinstance(adapter, VeRA):
            config, tensors = vera_form(file, adapter, parts)
        else:
            config, tensors = lora_form(adapter, parts)
        modules, own = modules_to_save(file, parts, model)
    except UserError as error:
        raise refusal(file, error.what, error.hint) from None
    known = without_local_paths(file.config)
    task = {name: value for name, value in known.get("metadata", {}).items() if name != "training"}
    task["base_model"] = known.get("base_model", {})
    config = {**_common(file), **config, "modules_to_save": modules or None}
    return PeftAdapter(config, {**tensors, **own}, task=task)


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


def _common(file: AdapterFile) -> dict[str, Any]:
    """Return the keys that all methods share."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_name(file.config.get("base_model", {})),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "revision": None,
        "task_type": "CAUSAL_LM" if file.metadata.get("task") == "CausalLMTask" else None,
    }


def base_name(base: Mapping[str, Any]) -> str | None:
    """Return the base model's id on the Hugging Face Hub, or None."""
    name, tag = base.get("name"), base.get("pretrained")
    if not name or tag == "random":
        return None
    if base.get("library") == "transformers":
        return str(name) if tag == name else None
    if base.get("library") == "timm":
        return f"timm/{name}" if "." in str(name) else None
    return None if base.get("sha256") else f"{name}/{tag}"
