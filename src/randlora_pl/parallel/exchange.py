"""How much the processes exchange while they train: a communication hook that counts."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks


@dataclass
class Exchange:
    """Gradients that one process has handed to the all-reduce.

    Attributes:
        bytes: All of them; a ring of n processes sends 2 (n - 1) / n times as much over each link.
        messages: Number of all-reduces.
        steps: Optimizer steps that they belong to.
    """

    bytes: int = 0
    messages: int = 0
    steps: int = 0

    @property
    def bytes_per_step(self) -> int | None:
        """Bytes of one optimizer step; None before the first."""
        return round(self.bytes / self.steps) if self.steps else None

    def figures(self) -> dict[str, Any]:
        """What ``results.json`` says of it."""
        messages = round(self.messages / self.steps, 2) if self.steps else None
        return {"exchange/bytes_per_step": self.bytes_per_step, "exchange/messages_per_step": messages}


def counted_mean(exchange: Exchange, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """The mean over all processes, as DistributedDataParallel takes it without a hook, and a count of the bytes."""
    gradient = bucket.buffer()
    exchange.bytes += gradient.numel() * gradient.element_size()
    exchange.messages += 1
    return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]
