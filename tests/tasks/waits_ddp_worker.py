"""Trains as one rank of a process group, with what is chosen on a GPU, and counts what the ranks exchange.

Usage: ``python -m tests.tasks.waits_ddp_worker FOLDER`` with the environment of ``test_ddp.py``. Writes RANK.pt.
"""

import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_pl.data import ImageData
from randlora_pl.run.callbacks import NonFiniteLoss, PeakMemory, RunCheckpoint, StepNumbers, Termination, Throughput
from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.tasks import AdaptationModule, VisionLanguageTask, make_trainer
from randlora_pl.utils.device import choose_as_on_cuda
from randlora_pl.utils.errors import UserError

from .small import METHODS, trained, two_blocks

RANK = int(os.environ["RANK"])


class Exchanged(TorchDispatchMode):
    """Counts what is exchanged between the end of the fourth and the eighth micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if self.on and name.startswith("c10d"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Window(L.Callback):
    def __init__(self, mode: Exchanged) -> None:
        self.mode = mode
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mode.on = 3 <= batch_idx < 7
        self.after.append(trained(pl_module.objective))


class Bad(VisionLanguageTask):
    """Its loss is infinite in the sixth micro-batch of rank 1, with a finite gradient."""

    def sample_losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        losses, right = super().sample_losses(batch)
        spoilt = (self.run.step(), batch["micro_batch"], RANK) == (2, 1, 1)
        return losses + torch.inf if spoilt else losses, right


class Signaled(L.Callback):
    """Rank 1 gets SIGTERM in the sixth micro-batch."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(kind: type[VisionLanguageTask], folder: Path, *more: L.Callback) -> dict[str, Any]:
    """Ten micro-batches, two per step, and how they ended."""
    task = kind("tiny", "random", adapter=METHODS["randlora"]())
    window = Window(mode := Exchanged())
    own: list[L.Callback] = [window, PeakMemory(), Throughput(), NonFiniteLoss(), StepNumbers(), RunCheckpoint()]
    own += [Termination(), *more]
    trainer = make_trainer(
        accelerator="cpu", devices=2, strategy=AdapterDDP(), callbacks=own, accumulate_grad_batches=2,
        limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    ended = ""
    with mode, choose_as_on_cuda():
        try:
            trainer.fit(AdaptationModule(task), ImageData(dataset="digits", shots=8, steps=5, batch_size=2))
        except (UserError, SystemExit) as error:
            ended = str(error) or type(error).__name__
    return {"ended": ended, "seen": dict(mode.seen), "after": window.after, "last": trained(task)}


if __name__ == "__main__":
    from tests.tasks.waits_ddp_worker import Bad as Importable  # of the main program it could not be saved

    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    with two_blocks():
        found = {kind.__name__: fit(kind, root / kind.__name__) for kind in (VisionLanguageTask, Importable)}
        found["signaled"] = fit(VisionLanguageTask, root / "signaled", Signaled())
    torch.save(found, root / f"{RANK}.pt")
