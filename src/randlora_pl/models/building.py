"""Surroundings in which models are built: reproducible, quiet, or without memory."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from randlora_pl.errors import UserError


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
    """Keep open_clip from installing a root log handler, as ``logging.info`` does where there is none."""
    handler = logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def first_line(error: Exception) -> str:
    """The beginning of an error's text, short enough for a message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


def set_gradient_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Recompute activations in the backward pass instead of keeping them.

    Args:
        model: A model of open_clip or timm, or an ``ImageTower``.
        enable: On or off.

    Raises:
        UserError: The model has no such switch, or the switch does nothing.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if callable(switch):
        with quiet():
            switch(enable)
    names = ("grad_checkpointing", "gradient_checkpointing")
    if enable and not any(getattr(module, name, False) for module in model.modules() for name in names):
        raise UserError(
            f"{type(model).__name__} has no gradient checkpointing. Use --model.gradient_checkpointing false."
        )
