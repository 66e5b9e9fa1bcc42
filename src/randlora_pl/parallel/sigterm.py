"""SIGTERM in trainings with several GPUs, which no GPU waits for."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from randlora_pl.utils.device import LateCopy, on_cuda


class LateSigterm:
    """Replacement for the broadcast of rank 0's SIGTERM before each micro-batch in Lightning 2.6.

    Lightning copies a number to the GPU, and reads the received one at once: the host waits twice. Here every process
    reads what it received one micro-batch before, so that all stop before the same micro-batch.

    Args:
        trainer: A trainer with several processes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._sent: LateCopy | None = None

    def __call__(self) -> None:
        """Send the state of rank 0; stop the training if it had received SIGTERM the time before."""
        if self._sent is not None and float(self._sent.read()):
            raise SIGTERMException
        flag = torch.full((), float(self._trainer.received_sigterm), device=self._trainer.strategy.root_device)
        dist.broadcast(flag, 0)
        self._sent = LateCopy(flag)

    @classmethod
    def use(cls, trainer: Trainer) -> None:
        """Replace Lightning's broadcast if there is one, and GPUs that wait for it."""
        loop: Any = trainer.fit_loop.epoch_loop
        name = "_broadcast_sigterm_tensor"
        if hasattr(type(loop), name) and any(on_cuda(p) for p in trainer.lightning_module.parameters()):
            setattr(loop, name, cls(trainer))
