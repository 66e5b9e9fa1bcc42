"""The training procedure of a task's method, called between optimizer steps and stored in checkpoints.

Functions take a task of any kind as ``Any``, because `AdaptationTask` imports this module.
"""

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from randlora_pl.adapters.procedure import Procedure, all_finite

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
    """Return the procedure's facts for ``results.json`` after a training."""
    procedure = procedure_of(task)
    return {} if procedure is None else procedure.finish()
