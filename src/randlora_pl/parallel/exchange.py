"""What the processes exchange while they train: gradients, by a communication hook that counts, and statistics."""

from collections.abc import Sequence
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


@torch.no_grad()
def share(tensors: Sequence[Tensor]) -> None:
    """Gives every process the values of process 0, in one broadcast for each dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        own = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in own])
        dist.broadcast(flat, 0)
        for tensor, values in zip(own, torch.split(flat, [tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(values.view_as(tensor))
