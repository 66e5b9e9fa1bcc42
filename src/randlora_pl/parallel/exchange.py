"""Communication during training: an all-reduce hook that counts gradient bytes, and broadcasts of statistics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks


@dataclass
class Exchange:
    """Gradients that one process has passed to the all-reduce.

    Attributes:
        bytes: Total bytes; a ring of n processes sends 2 (n - 1) / n times as much over each link.
        messages: Number of all-reduces.
        steps: Optimizer steps with these all-reduces.
    """

    bytes: int = 0
    messages: int = 0
    steps: int = 0

    @property
    def bytes_per_step(self) -> int | None:
        """Bytes per optimizer step, or None before the first step."""
        return round(self.bytes / self.steps) if self.steps else None

    def figures(self) -> dict[str, Any]:
        """Return the entries for ``results.json``."""
        messages = round(self.messages / self.steps, 2) if self.steps else None
        return {"exchange/bytes_per_step": self.bytes_per_step, "exchange/messages_per_step": messages}


def counted_mean(exchange: Exchange, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Average gradients over all processes like DistributedDataParallel without a hook, and count the bytes."""
    gradient = bucket.buffer()
    exchange.bytes += gradient.numel() * gradient.element_size()
    exchange.messages += 1
    return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


@torch.no_grad()
def share(tensors: Sequence[Tensor]) -> None:
    """Copy the tensors of rank 0 to every process, with one broadcast per dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        own = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in own])
        dist.broadcast(flat, 0)
        for tensor, values in zip(own, torch.split(flat, [tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(values.view_as(tensor))
