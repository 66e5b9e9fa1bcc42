"""Surroundings in which models are built: reproducible, quiet, or without memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from randlora_pl.utils.errors import UserError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make what is built inside a pure function of ``seed``: on the CPU, in fp32.

    The caller's random state, default device and default precision are left as they were; GPU
    generators are not touched, which ``torch.manual_seed`` would do.

    Args:
        seed: Seed of PyTorch's CPU generator inside the block.
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
    """Silence what open_clip writes to the root logger (every step of a build).

    ``logging.info`` also installs a root handler where there is none, which would print the
    application's own lines a second time. Records of other loggers are not touched.
    """
    root = logging.getLogger()
    handler = logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(_no_record)
    try:
        yield
    finally:
        root.removeFilter(_no_record)
        root.removeHandler(handler)


def _no_record(record: logging.LogRecord) -> bool:
    return False


def check_size(name: str, size: int, patch: int) -> None:
    """Refuse an image size that a model's patches do not divide.

    Args:
        name: Name of the model, for the message.
        size: Height and width of the images in pixels.
        patch: Height and width of a patch in pixels; 1 for models without patches.

    Raises:
        UserError: The size is not positive, or no multiple of the patch; names the nearest sizes.
    """
    if size < 1:
        raise UserError(f"{name}: the image size must be positive, not {size}.")
    if size % patch:
        low = max(1, size // patch) * patch
        raise UserError(
            f"{name} cuts images into patches of {patch} pixels: {size} is no multiple. "
            f"Nearest sizes: {low} and {low + patch}."
        )


def patch_size(model: nn.Module) -> int:
    """Height of a timm model's patches in pixels, 1 where it has none, or patches that overlap (PVT)."""
    embedding = getattr(model, "patch_embed", None)
    size, projection = getattr(embedding, "patch_size", 1), getattr(embedding, "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.stride != projection.kernel_size:
        return 1
    return int(size[0] if isinstance(size, tuple) else size)


def set_gradient_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    Args:
        model: A model of open_clip or timm, or an ``ImageTower``.
        enable: On or off.

    Raises:
        UserError: The model has no such switch, or the switch does nothing.
    """
    if _checkpointing(model) == enable:
        return
    switch = getattr(model, "set_grad_checkpointing", None)
    if callable(switch):
        with quiet():
            switch(enable)
    if _checkpointing(model) != enable:  # some towers only warn, others do nothing
        raise UserError(
            f"{type(model).__name__} cannot switch gradient checkpointing {'on' if enable else 'off'}. "
            "Use --model.gradient_checkpointing false and a smaller --data.batch_size."
        )


def _checkpointing(model: nn.Module) -> bool:
    names = ("grad_checkpointing", "gradient_checkpointing")  # open_clip and timm; transformers
    return any(getattr(module, name, False) for module in model.modules() for name in names)
