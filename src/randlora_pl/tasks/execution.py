"""Execution of a backbone: the dtype of its frozen weights, and compiled blocks."""

from typing import Any

import torch
from torch import nn

from randlora_pl.adapters import Adapter
from randlora_pl.models import cast_frozen, compile_blocks
from randlora_pl.tasks.defaults import check_precision
from randlora_pl.utils.errors import UserError


def cast_and_compile(
    backbone: nn.Module, adapter: Adapter, frozen_dtype: str, torch_compile: bool | str, trainer: Any
) -> None:
    """Cast frozen weights and compile blocks, as the options of a task ask; ``trainer`` may be None.

    Raises:
        UserError: If the options do not go together.
    """
    check_precision(None if trainer is None else str(trainer.precision), frozen_dtype)
    if frozen_dtype != "float32" and not cast_frozen(backbone, getattr(torch, frozen_dtype)):
        raise UserError(f"--model.frozen_dtype {frozen_dtype}: {adapter.method()} leaves no matrix frozen to cast.")
    if torch_compile:
        if getattr(adapter, "memory", None) == "low":
            raise UserError(
                "--model.torch_compile keeps what memory: low would build again: leave out one of them, or take "
                "--model.gradient_checkpointing true instead of memory: low."
            )
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        compile_blocks(backbone, "inductor" if torch_compile is True else torch_compile, device)
