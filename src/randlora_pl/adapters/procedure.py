"""Training procedures: actions of a method between optimizer steps, such as pruning ranks.

Tasks call a model's procedure themselves and store its state in checkpoints. In a training loop of one's own, call it:

    procedure = inject(model, adapter).procedure
    procedure.start(model)
    for step in range(steps):
        penalty = procedure.penalty()
        loss = own_loss() if penalty is None else own_loss() + penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        procedure.after_step(step, steps)
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Procedure:
    """Actions of a method between optimizer steps; the base class does nothing.

    Keep the updates that `Adapter.procedure` finds in the model rather than the model itself, whose report holds the
    procedure. Put what the result depends on into buffers that `DeltaWeight.kept` names, not into the state.

    Attributes:
        ran: True once `after_step` was called, or the values came from a file or a checkpoint.
    """

    ran = False

    def start(self, model: nn.Module) -> None:
        """Prepare the state of a new run, on the model's device; a resumed run then loads its own state."""

    def penalty(self) -> Tensor | None:
        """Return a term of the loss of an optimizer step, a scalar, or None.

        With several micro-batches, add it to the last one's loss only, times their number if the loss is divided by it.
        """
        return None

    def after_step(self, step: int, total: int) -> None:
        """Act right after an optimizer step, while its gradients are there; call this method of the base class, too.

        Args:
            step: Optimizer steps that were finished before this one, from 0.
            total: Optimizer steps of the whole run.
        """
        self.ran = True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model: tensors, and values of plain Python."""
        return {}

    def state_size(self) -> int:
        """Return the numbers in the tensors of `state_dict` after `start`, for the expected size of a checkpoint."""
        return 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`, after `start`; its tensors may be on another device."""

    def finish(self) -> dict[str, Any]:
        """Return facts of the training for ``results.json``, JSON values by flat key."""
        return {}


def all_finite(tensors: Iterable[Tensor | None]) -> Tensor:
    """Return True, as a scalar tensor on their device, if all tensors (at least one) are finite; the host is idle."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors if tensor is not None]).all()
