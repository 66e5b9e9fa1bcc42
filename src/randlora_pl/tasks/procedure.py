"""The training procedure of a task's method: called between optimizer steps, given losses, stored in checkpoints.

Functions take a task of any kind as ``Any``, because `AdaptationTask` imports this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from randlora_pl.adapters.methods.autolora import Problem, SelectionSearch
from randlora_pl.adapters.procedure import Procedure, all_finite
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError

KEY = "procedure"
"""Key of the state in a checkpoint."""


def procedure_of(task: Any) -> Procedure | None:
    """Return the procedure of a task's model, or None."""
    procedure: Procedure | None = task.report.procedure
    return procedure


def start(task: Any) -> None:
    """Start the procedure of a new or resumed run, with the model on its device."""
    if (procedure := procedure_of(task)) is None:
        return
    procedure.start(task.model)
    if isinstance(procedure, SelectionSearch):
        procedure.problem = problem_of(task)
    if task.procedure_state is not None:
        procedure.load_state_dict(task.procedure_state)
        procedure.ran, task.procedure_state = True, None


def penalty(task: Any, batch: dict[str, Any]) -> Tensor | None:
    """Return the procedure's term of a micro-batch's loss; only the last of an optimizer step has it.

    Lightning divides the loss by the accumulation, also in a shorter last step. DDP averages over the processes, which
    all have the same term.
    """
    procedure = procedure_of(task)
    if procedure is None or batch["micro_batch"] < batch["micro_batches"] - 1:
        return None
    term = procedure.penalty()
    return None if term is None else term * task.trainer.accumulate_grad_batches


def optimizer_step(task: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any | None = None) -> None:
    """Do an optimizer step and then call the procedure, before any callback can save; tasks have this as a method.

    A step that 16-mixed skips because a gradient is not finite is skipped here, too.
    """
    LightningModule.optimizer_step(task, epoch, batch_idx, optimizer, optimizer_closure)
    if (procedure := procedure_of(task)) is None:
        return
    scaled = getattr(task.trainer.precision_plugin, "scaler", None) is not None  # the host has waited for the gradients
    if scaled and not bool(all_finite(parameter.grad for parameter in task.parameters())):
        return
    procedure.after_step(task.trainer.global_step, task.total_steps())  # counts this step later


def store(task: Any, checkpoint: dict[str, Any]) -> None:
    """Add the procedure's state to a checkpoint."""
    if (procedure := procedure_of(task)) is not None:
        checkpoint[KEY] = procedure.state_dict() if task.procedure_state is None else task.procedure_state


def restore(task: Any, checkpoint: dict[str, Any]) -> None:
    """Take the procedure's state from a checkpoint; `start` loads it."""
    task.procedure_state = checkpoint.get(KEY)


def facts(task: Any) -> dict[str, Any]:
    """Return the procedure's facts for ``results.json`` after a training run."""
    procedure = procedure_of(task)
    return {} if procedure is None else procedure.finish()


def problem_of(task: Any) -> Problem:
    """Return the losses of a search in a task that trains, on batches of its data module.

    Raises:
        UserError: Its data module cannot hold out samples.
    """
    trainer = task.trainer
    if not hasattr(getattr(trainer, "datamodule", None), "search_batch"):
        raise UserError("AutoLoRA needs a data module that holds out training samples, such as ImageData.")
    scaler = getattr(trainer.precision_plugin, "scaler", None)  # of 16-mixed
    return Problem(
        train_loss=lambda step: _loss(task, step, "train"),
        search_loss=lambda step: _loss(task, step, "search"),
        rates=lambda: [(each, group["lr"]) for group in trainer.optimizers[0].param_groups for each in group["params"]],
        average=lambda gradient: trainer.strategy.reduce(gradient, reduce_op="mean"),
        scale=lambda: 1.0 if scaler is None else scaler.get_scale(),
    )


def _loss(task: Any, step: int, part: Literal["search", "train"]) -> Tensor:
    """Return the mean loss of a search batch, with dropout as a function of the seed and the step."""
    trainer = task.trainer
    batch = trainer.strategy.batch_to_device(trainer.datamodule.search_batch(step, part))
    if task._draws:
        position = torch.tensor(step * trainer.world_size + trainer.global_rank)
        torch.manual_seed(int(rng.words(task.seed, f"{part}-dropout", position)))
    with _untouched(task), trainer.precision_plugin.forward_context():
        losses, _ = task.sample_losses(batch)
        loss: Tensor = (losses * task.loss_weights(batch)).sum()
    return loss


@contextmanager
def _untouched(task: Any) -> Iterator[None]:
    """Put the text features of the image-text task's own optimizer step aside, and restore them."""
    held = getattr(task, "_step_features", None)
    try:
        yield
    finally:
        if hasattr(task, "_step_features"):
            task._step_features = held
