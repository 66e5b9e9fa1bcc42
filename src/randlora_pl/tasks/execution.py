"""Execution of a backbone: the dtype of its frozen weights, and compiled blocks."""

from typing import Any

import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from randlora_pl.adapters import Adapter, AdapterFile, InjectionReport, inject
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.methods.randlora_update import RandLoRADelta
from randlora_pl.adapters.methods.refine import Start, refine
from randlora_pl.adapters.random_bases import drawn_on
from randlora_pl.models import cast_frozen, compile_blocks, use_fast_layers
from randlora_pl.utils.errors import UserError


def inject_by(
    trainer: Any,
    backbone: nn.Module,
    adapter: Adapter,
    targets: list[str] | None,
    source: AdapterFile | Start | None = None,
) -> InjectionReport:
    """Inject an adapter; its random bases are drawn on the GPU of the trainer, if that has one and is not None.

    Args:
        trainer: Trainer, or None.
        backbone: The plain model.
        adapter: Method and its options.
        targets: Layers to adapt.
        source: File that names the layers instead, or the LoRA whose outputs the adapter starts with.
    """
    device = None if trainer is None else trainer.strategy.root_device
    with drawn_on(device if device is not None and device.type == "cuda" else None):
        if isinstance(source, Start):
            return refine(backbone, source.file, adapter, source.form, targets)
        return inject(backbone, adapter, targets if source is None else source.targets)


def chosen_dtype(frozen_dtype: str, adapter: Adapter, trainer: Any) -> str:
    """Return the dtype of frozen matrices that an option stands for: ``auto`` depends on precision and method."""
    if frozen_dtype != "auto":
        return frozen_dtype
    mixed = trainer is not None and str(trainer.precision) == "bf16-mixed"
    return "bfloat16" if mixed and adapter.keeps_base else "float32"


def cast_and_compile(
    backbone: nn.Module, adapter: Adapter, frozen_dtype: str, torch_compile: bool | str, trainer: Any
) -> None:
    """Cast frozen weights and compile blocks, as the options of a task ask; ``trainer`` may be None.

    Raises:
        UserError: If the options exclude each other, or training would fail or round its small steps away.
    """
    precision = None if trainer is None else str(trainer.precision)
    if precision in ("bf16-true", "16-true"):
        raise UserError(
            f"--trainer.precision {precision} would round the trainable parameters and small updates. Use bf16-mixed, "
            "and --model.frozen_dtype bfloat16 to keep the frozen weights in half the memory."
        )
    frozen_dtype = chosen_dtype(frozen_dtype, adapter, trainer)
    if frozen_dtype == "bfloat16" and precision not in (None, "bf16-mixed"):
        raise UserError(f"--model.frozen_dtype bfloat16 needs --trainer.precision bf16-mixed, not {precision}.")
    if frozen_dtype != "float32" and not cast_frozen(backbone, getattr(torch, frozen_dtype)):
        raise UserError(f"--model.frozen_dtype {frozen_dtype}: {adapter.method()} leaves no matrix frozen to cast.")
    use_fast_layers(backbone)
    if torch_compile:
        if any(getattr(leaf, "memory", None) == "low" for leaf in adapter.leaves()):
            raise UserError(
                "--model.torch_compile keeps what memory: low would build again: leave out one of them, or take "
                "--model.gradient_checkpointing true instead of memory: low."
            )
        device = torch.device("cpu") if trainer is None else trainer.strategy.root_device
        compile_blocks(backbone, "default" if torch_compile is True else torch_compile, device)


def prepare_products(task: nn.Module, precision: str) -> None:
    """Make the copies of RandLoRA's bases for products in a precision, which compiled blocks read."""
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    for module in task.modules():
        if isinstance(module, RandLoRADelta):
            module.prepare(dtype)


_FIXED = (nn.Linear, nn.LayerNorm, nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.ParameterDict, nn.ParameterList)
"""Modules that draw no random numbers."""


def draws_random_numbers(task: nn.Module) -> bool:
    """Return True if a module in training mode has dropout, or might draw random numbers in another way."""
    return any(_draws(module) for module in task.modules() if module.training)


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p > 0
    own = type(module).__module__.partition(".")[0] == __name__.partition(".")[0]
    if isinstance(module, DeltaWeight) and own:
        return module.drops
    return not (own or type(module) in _FIXED or isinstance(module, Metric | MetricCollection))
