"""The run of an objective, as far as it may know it, and how its model computes there."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from randlora_pl.models import cast_frozen, compile_blocks, use_fast_layers
from randlora_pl.utils.errors import UserError

if TYPE_CHECKING:
    from randlora_pl.data.base import PlannedData

_CPU = torch.device("cpu")
Data_co = TypeVar("Data_co", bound="PlannedData", covariant=True)


@dataclass(frozen=True)
class Run(Generic[Data_co]):
    """The run of an objective, as far as it may know it; the defaults are those outside any run.

    Attributes:
        data: The data module.
        device: Device of this process.
        precision: Lightning's name of the precision.
        rank: Number of this process.
        step: Function that returns the optimizer steps so far.
        total_steps: Function that returns the optimizer steps of the whole run.
        micro_batches: Function that returns the micro-batches of an optimizer step.
        loss_factor: Function that returns the factor of a loss before its backward pass.
        autocast: Function that returns the context of a forward pass.
        gather: Function from a tensor (n, ...) to the tensors of all processes, one after the other.
        broadcast: Function from an object to the one of the first process.
    """

    data: Data_co | None = None
    device: torch.device = _CPU
    precision: str | None = None
    rank: int = 0
    step: Callable[[], int] = lambda: 0
    total_steps: Callable[[], int] = lambda: 0
    micro_batches: Callable[[], int] = lambda: 1
    loss_factor: Callable[[], Tensor | float] = lambda: 1.0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    broadcast: Callable[[Any], Any] = lambda value: value


def build_backbone(
    build: Callable[[], nn.Module], form: str | None, device: torch.device, dtype: str
) -> tuple[nn.Module, list[str]]:
    """Build a backbone, with frozen weights in few bits if a form is given; return it, and notes for the user."""
    if form is None:
        return build(), []
    from randlora_pl.tasks.quantize import build_quantized

    return build_quantized(build, form, device, dtype)


def cast_and_compile(
    backbone: nn.Module, method: str, dtype: str, compiled: bool | str, low: bool, run: "Run[PlannedData]"
) -> None:
    """Cast frozen weights and compile blocks; refuse options that cannot be combined or round small steps away.

    Args:
        backbone: Model with the adapter.
        method: Name of the method.
        dtype: Dtype of frozen matrices.
        compiled: The option ``torch_compile``.
        low: True if the method builds its bases again in each pass.
        run: The run, whose precision has to fit.
    """
    if run.precision in ("bf16-true", "16-true"):
        raise UserError(
            f"--trainer.precision {run.precision} would round the trainable parameters and small updates. Use "
            "bf16-mixed, and --model.frozen_dtype bfloat16 to keep the frozen weights in half the memory."
        )
    if dtype == "bfloat16" and run.precision not in (None, "bf16-mixed"):
        raise UserError(f"--model.frozen_dtype bfloat16 needs --trainer.precision bf16-mixed, not {run.precision}.")
    if dtype != "float32" and not cast_frozen(backbone, getattr(torch, dtype)):
        raise UserError(f"--model.frozen_dtype {dtype}: {method} leaves no matrix frozen to cast.")
    use_fast_layers(backbone)
    if compiled:
        if low:
            raise UserError(
                "--model.torch_compile keeps what memory: low would rebuild: leave out one of them, or use "
                "--model.gradient_checkpointing true instead of memory: low."
            )
        compile_blocks(backbone, "default" if compiled is True else compiled, run.device)
