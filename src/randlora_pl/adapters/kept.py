"""Kept buffers, which training changes without a gradient, and the hash of the weights that stay.

There are two kinds. Buffers of an update are named in `DeltaWeight.kept` and always stored. Buffers of the model
are statistics such as the running mean of BatchNorm, which change if a module of the base is in training mode. They are
stored if they differ from their values at injection. The hash does not depend on adapters, merged or not.
"""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.layers.adapted import AdaptedLayer
from randlora_pl.adapters.layers.weight_access import is_quantized


def update_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the kept buffers of all updates in a module, by name; the module may be an update itself."""
    return {
        f"{path}.{name}".lstrip("."): getattr(each, name)
        for path, each in module.named_modules()
        if isinstance(each, DeltaWeight)
        for name in each.kept
    }


def kept_problems(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> list[str]:
    """Return the reasons that the kept buffers of a file, if they have the right shapes, cannot be loaded.

    Args:
        module: Model or update with the buffers to load.
        tensors: Tensors of the file.
        prefix: Prefix of the module's names in the file.
    """
    found = []
    for path, each in module.named_modules():
        if not isinstance(each, DeltaWeight):
            continue
        start = f"{prefix}{path}." if path else prefix
        own = {name: getattr(each, name) for name in each.kept}
        there = {name: tensors[f"{start}{name}"] for name in own if f"{start}{name}" in tensors}
        odd = [name for name in there if _kind(there[name]) != _kind(own[name])]
        found += [f"{start}{name} is {there[name].dtype} in the file and {own[name].dtype} here" for name in odd]
        if there and not odd and all(there[name].shape == own[name].shape for name in there):
            for name, size in each.indexes.items():
                places = there.get(name, torch.empty(0))
                inside = not len(places) or (int(places[0]) >= 0 and int(places[-1]) < size)
                if not inside or not bool((places[1:] > places[:-1]).all()):
                    found.append(f"{start}{name} must be distinct places from 0 to {size - 1}, in ascending order")
    return found


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "bool" if tensor.dtype == torch.bool else "integer"


def update_modules(model: nn.Module) -> set[nn.Module]:
    """Return the updates and all their child modules."""
    return {inner for each in model.modules() if isinstance(each, DeltaWeight) for inner in each.modules()}


def base_buffers(model: nn.Module, training: bool = False) -> dict[str, Tensor]:
    """Return the model's own persistent buffers that may be statistics, by name: floats, and scalar counters.

    Args:
        model: Model, with or without an adapter.
        training: If True, return only buffers of modules in training mode, which a forward pass may change.
    """
    updates = update_modules(model)
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        if module not in updates and (module.training or not training)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and (buffer.is_floating_point() or not buffer.dim())
    }


def moved_buffers(model: nn.Module, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the model's own buffers that differ from ``before`` (default: their values at injection), by name."""
    before = getattr(getattr(model, "adapter_report", None), "buffers", {}) if before is None else before
    return {
        name: buffer
        for name, buffer in base_buffers(model).items()
        if name in before and not torch.equal(buffer.detach().cpu(), before[name].to(buffer.dtype))
    }


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return every kept buffer of a model with an adapter, by name."""
    return update_buffers(model) | moved_buffers(model)


@torch.no_grad()
def reset_buffers(model: nn.Module) -> None:
    """Restore the model's own buffers to their values at injection."""
    before = getattr(getattr(model, "adapter_report", None), "buffers", {})
    for name, buffer in base_buffers(model).items():
        if name in before:
            buffer.copy_(before[name])


def forget_computed(model: nn.Module) -> None:
    """Clear values that modules have cached from old weights, by switching them to training mode and back."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in modes.items():
        module.training = mode


def hash_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return the SHA-256 of each parameter's name, shape and up to 1,024 evenly spaced values, rounded to bfloat16.

    The sample distinguishes weights quickly, also for models with billions of parameters. The rounding gives a model in
    float32 and bfloat16 the same hash. The hash is "" on the meta device, and for quantized weights, whose original
    values are unknown. An adapted model has the hash of its base.

    Args:
        model: Model, with or without an adapter.
        without: Names of parameters to exclude.
    """
    if any(is_quantized(module) for module in model.modules()):
        return ""
    originals = {
        id(layer.adapted_weight): layer.frozen_weight
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer) and layer.frozen_weight is not None
    }
    updates = {id(own) for module in update_modules(model) for own in module.parameters(recurse=False)}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in without or id(parameter) in updates:
            continue
        if parameter.is_meta:
            return ""
        flat = originals.get(id(parameter), parameter).detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)][:1024].to(torch.bfloat16)
        digest.update(f"{name}:{tuple(parameter.shape)}".encode())
        digest.update(sample.cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
