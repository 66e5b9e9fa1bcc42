"""Kept buffers: what training changes in a model without a gradient, and what an adapter therefore carries along.

There are two kinds. An update names its own in `DeltaWeight.kept`; they are always kept. The model's are statistics
such as the running mean of BatchNorm, which move wherever a module of the base is in training mode; they are kept if
they are no longer what they were when the adapter came into the model, whoever put the module into that mode.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight


def update_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the kept buffers of the updates in a module, by name; the module may be an update itself."""
    return {
        f"{path}.{name}".lstrip("."): getattr(each, name)
        for path, each in module.named_modules()
        if isinstance(each, DeltaWeight)
        for name in each.kept
    }


def update_modules(model: nn.Module) -> set[nn.Module]:
    """Return the modules of the updates, and everything within them."""
    return {inner for each in model.modules() if isinstance(each, DeltaWeight) for inner in each.modules()}


def base_buffers(model: nn.Module, training: bool = False) -> dict[str, Tensor]:
    """Return the persistent buffers of the model's own that may be statistics, by name: floats, and single counters.

    Args:
        model: The model, with or without an adapter.
        training: Take only those of modules in training mode, which a forward pass may change.
    """
    updates = update_modules(model)
    return {
        f"{path}.{name}".lstrip("."): buffer
        for path, module in model.named_modules()
        if module not in updates and (module.training or not training)
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set and (buffer.is_floating_point() or not buffer.dim())
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the model's own buffers, on the CPU; none on the meta device."""
    return {name: buffer.detach().cpu().clone() for name, buffer in base_buffers(model).items() if not buffer.is_meta}


def moved_buffers(model: nn.Module, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the model's own buffers that are no longer those before its adapter, or others, by name."""
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
    """Put the model's own buffers back to what they were when the adapter came into it."""
    before = getattr(getattr(model, "adapter_report", None), "buffers", {})
    for name, buffer in base_buffers(model).items():
        if name in before:
            buffer.copy_(before[name])


def forget_computed(model: nn.Module) -> None:
    """Let modules forget what they have computed from weights that were others: some keep it until they train."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in modes.items():
        module.training = mode
