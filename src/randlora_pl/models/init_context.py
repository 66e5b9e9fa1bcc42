"""Context managers for building models (seeded, silent), checks of image sizes, gradient checkpointing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from randlora_pl.utils.errors import UserError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Build models inside the block on the CPU, in fp32, as a pure function of ``seed``.

    The caller's random state, default device and default dtype are restored. Unlike with ``torch.manual_seed``, GPU
    generators are not changed.
    """
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip's messages on the root logger (one per step of a build).

    ``logging.info`` would also install a root handler if none exists, which would print the application's log twice.
    Records of other loggers are not filtered.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    no_record = lambda record: False  # noqa: E731
    root.addHandler(handler)
    root.addFilter(no_record)
    try:
        yield
    finally:
        root.removeFilter(no_record)
        root.removeHandler(handler)


def check_size(name: str, size: int, patch: int) -> None:
    """Raise a `UserError` if an image size is not a positive multiple of the patch size, both in pixels."""
    if size < 1:
        raise UserError(f"{name}: the image size must be positive, not {size}.")
    if size % patch:
        low = max(1, size // patch) * patch
        raise UserError(
            f"{name} cuts images into patches of {patch} pixels: {size} is not a multiple. "
            f"Nearest sizes: {low} and {low + patch}."
        )


def patch_size(model: nn.Module) -> int:
    """Return the height of a timm model's patches in pixels; 1 for no patches or overlapping ones (PVT)."""
    embedding = getattr(model, "patch_embed", None)
    size, projection = getattr(embedding, "patch_size", 1), getattr(embedding, "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.stride != projection.kernel_size:
        return 1
    return int(size[0] if isinstance(size, tuple) else size)


def set_gradient_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Recompute activations in the backward pass instead of keeping them, or keep them again.

    Examples:
        >>> set_gradient_checkpointing(load_vit("vit_tiny_patch16_224").model)

    Raises:
        UserError: The model does not support it, or ignores the setting.
    """
    if _checkpointing(model) == enable:
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if callable(switch):
        with quiet():
            switch(enable)
    if _checkpointing(model) != enable:  # some towers only warn, others ignore it
        raise UserError(
            f"{type(model).__name__} cannot switch gradient checkpointing {'on' if enable else 'off'}. "
            "Use --model.gradient_checkpointing false and a smaller --data.batch_size."
        )


def _checkpointing(model: nn.Module) -> bool:
    names = ("grad_checkpointing", "gradient_checkpointing")  # open_clip and timm; transformers
    return any(getattr(module, name, False) for module in model.modules() for name in names)
