"""The optimizer and schedules of the protocols: AdamW, and a cosine or a line, stepped per optimizer step."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from randlora_pl.adapters.optimizer import make_optimizer
from randlora_pl.models.execution import GRAPHS
from randlora_pl.utils.device import on_cuda


def parameter_groups(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, decay_vectors: bool
) -> list[dict[str, Any]]:
    """Return optimizer groups of matrices and of vectors, the same whatever decays, so that a checkpoint fits.

    Frozen parameters are left out. With ``decay_vectors`` biases, norms and scalars decay too, as in the protocol.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    vectors = [p for p in parameters if p.dim() <= 1]
    groups = [(matrices, weight_decay), (vectors, weight_decay if decay_vectors else 0.0)]
    return [{"params": some, "lr": learning_rate, "weight_decay": decay} for some, decay in groups if some]


def schedule_factor(step: int, total: int, warmup: int, final: float, schedule: str = "cosine") -> float:
    """Return the factor of the learning rate at an optimizer step: linear warm-up, then half a cosine or a line.

    Args:
        step: Finished optimizer steps.
        total: Optimizer steps of the whole run.
        warmup: Steps of the linear warm-up, 0 for none.
        final: Factor at the end.
        schedule: ``cosine`` or ``linear``.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return final + (1 - final) * left


def adamw_with_schedule(
    groups: Sequence[dict[str, Any]],
    total: int,
    warmup: int,
    final: float,
    fused: bool = False,
    schedule: str = "cosine",
    model: nn.Module | None = None,
) -> tuple[Optimizer, LambdaLR]:
    """Return AdamW (betas 0.9 and 0.999, as the protocol) and its schedule (see `schedule_factor`).

    Groups may have options of their own (``lr``, ``weight_decay``, ``eps``). With ``fused`` one kernel updates all
    tensors; PyTorch then unscales gradients in it, after any clipping. The adapter of
    ``model`` may have an optimizer of its own (`make_optimizer`).
    """
    make = AdamW if model is None else partial(make_optimizer, model)
    optimizer = make([dict(group) for group in groups], betas=(0.9, 0.999), eps=1e-8, fused=fused)
    return optimizer, LambdaLR(optimizer, lambda step: schedule_factor(step, total, warmup, final, schedule))


def set_learning_rates(optimizer: Optimizer, scheduler: LambdaLR, groups: Sequence[dict[str, Any]]) -> None:
    """Set this run's learning rates and decays in an optimizer, new or restored, and a scheduler at the same step.

    The groups must be in the optimizer's order.
    """
    scheduler.base_lrs = [group["lr"] for group in groups]
    for group, own, factor in zip(optimizer.param_groups, groups, scheduler.lr_lambdas, strict=True):
        group["weight_decay"], group["initial_lr"] = own["weight_decay"], own["lr"]
        group["lr"] = own["lr"] * factor(scheduler.last_epoch)
        group["eps"] = own.get("eps", group["eps"])


def configure_gradient_clipping(
    task: Any, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
) -> None:
    """Clip the whole gradient once per optimizer step, by Lightning's options if they are given.

    The official code clips every micro-batch. The norm before clipping is logged. Tasks have this as a method.
    """
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    if gradient_clip_algorithm == "value":  # Lightning's own function takes no fused optimizer
        nn.utils.clip_grad_value_(trained, math.inf if gradient_clip_val is None else gradient_clip_val)
    else:
        limit = task.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        task.log("train/grad_norm", nn.utils.clip_grad_norm_(trained, limit or math.inf))


def optimizer_zero_grad(task: Any, epoch: int, batch_idx: int, optimizer: Any) -> None:
    """Drop the gradients; with CUDA graphs set them to zero in memory of their own.

    A graph's memory, which PyTorch would take for the gradient of a first backward pass, is written again by the next
    micro-batch. Tasks have this as a method.
    """
    keeps = task.torch_compile in GRAPHS
    optimizer.zero_grad(set_to_none=not keeps)
    if keeps:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


def configure_optimizers(task: Any) -> OptimizerLRScheduler:
    """Return the method's optimizer and its schedule per optimizer step.

    AdamW is fused unless 16-mixed scales the gradients. Tasks have this as a method.
    """
    fuses = task.device.type == "cpu" or any(on_cuda(parameter) for parameter in task.parameters())
    fused = fuses and getattr(task.trainer.precision_plugin, "scaler", None) is None
    how = (task.total_steps(), task.warmup_steps, task.final_lr_fraction, fused, task.schedule, task.model)
    optimizer, scheduler = adamw_with_schedule(task.optimizer_groups(), *how)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def planned_steps(trainer: Any) -> int:
    """Return the optimizer steps of the run, from the data module's plan if it has one.

    Lightning's own estimate makes the data loader, and so fixes its start, before a checkpoint is loaded.
    """
    plan = getattr(getattr(trainer, "datamodule", None), "plan", None)
    if plan is None:
        return int(trainer.estimated_stepping_batches)
    return int(plan.steps if trainer.max_steps < 0 else min(plan.steps, trainer.max_steps))
