"""Sample order of a run: pure functions of (seed, draw number), for any number of workers and ranks.

Training is one loop over numbered draws. A *window* is the global batch of one optimizer step; it is split into
micro-batches for gradient accumulation and for the ranks of a distributed run.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from randlora_pl.data.sampling.balance import ClassDraws
from randlora_pl.utils import rng


@lru_cache(maxsize=2)
def _epoch_order(seed: int, size: int, epoch: int) -> Tensor:
    return rng.permutation(seed, "order", size, part=epoch)


@dataclass(frozen=True)
class DrawPlan:
    """Sample order of a training run.

    Attributes:
        num_samples: Number of training samples.
        total_draws: Number of draws of the whole run.
        window: Draws per optimizer step (batch size x accumulation x ranks); the last step may have fewer.
        seed: Seed of the order.
        sampling: ``with_replacement`` (the paper: uniform, independent draws) or ``epochs`` (a new order of all samples
            in each pass).
        classes: Draws every class equally often; None draws every sample equally often.
    """

    num_samples: int
    total_draws: int
    window: int
    seed: int = 0
    sampling: str = "with_replacement"
    classes: ClassDraws | None = field(default=None, compare=False, repr=False)

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return -(-self.total_draws // self.window)

    def window_draws(self, step: int) -> Tensor:
        """Return the draw numbers of one optimizer step, int64 (window,) or shorter for the last step."""
        return torch.arange(step * self.window, min((step + 1) * self.window, self.total_draws))

    def samples(self, draws: Tensor) -> Tensor:
        """Return the sample of each draw, int64 of the same shape as ``draws``."""
        if self.classes is not None:
            return self.classes.samples(self.seed, draws, self.sampling)
        if self.sampling == "with_replacement":
            return rng.integers(self.seed, "order", draws, self.num_samples)
        epochs = torch.div(draws, self.num_samples, rounding_mode="floor")
        samples = torch.empty_like(draws)
        for epoch in torch.unique(epochs).tolist():
            here = epochs == epoch
            samples[here] = _epoch_order(self.seed, self.num_samples, epoch)[draws[here] % self.num_samples]
        return samples


def total_draws(num_samples: int, epochs: int, window: int, min_batches_per_epoch: int = 0) -> int:
    """Return the draws of a run: samples x epochs, where short epochs are repeated.

    If ``num_samples / window < min_batches_per_epoch``, the samples are repeated
    ``floor(min_batches_per_epoch * window / num_samples) + 1`` times, as the official code does for few-shot sets.
    """
    repeats = 1
    if num_samples < min_batches_per_epoch * window:
        repeats = min_batches_per_epoch * window // num_samples + 1
    return num_samples * repeats * epochs


def _share(size: int, parts: int, part: int) -> tuple[int, int, int]:
    """Return (first, end, width) of one part of ``range(size)``; each part is padded to the width."""
    width = -(-size // parts)
    return min(part * width, size), min((part + 1) * width, size), width


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch of one rank.

    Attributes:
        draws: int64 (b,), draw numbers; padding repeats the last draw of the window.
        weights: float32 (b,), accumulation x ranks / window size for a draw, 0 for padding: Lightning divides the
            loss by the accumulation and DDP averages over ranks, so that sum(weight * loss) becomes the window's mean.
        window: int64 (window size,), draws of the whole window, all ranks and micro-batches.
        micro: Index in the window.
        micros: Number of micro-batches in this window.
    """

    draws: Tensor
    weights: Tensor
    window: Tensor
    micro: int
    micros: int

    def entries(self, indices: Tensor, labels: Tensor, classes: Tensor | None) -> dict[str, Any]:
        """Return the batch entries of samples (b,) with labels (b,); their weights include class weights."""
        weight = self.weights if classes is None else self.weights * classes[labels]
        return {"weight": weight, "draw": self.draws, "index": indices, "micro": self.micro, "micros": self.micros}


@dataclass(frozen=True)
class TrainSchedule:
    """Micro-batches of one rank, numbered through the run.

    Every window has ``accumulate`` micro-batches, except a shorter last window, which has as few as possible; all ranks
    have the same number.

    Attributes:
        plan: Sample order; its window is batch size x accumulation x ranks.
        batch_size: Maximum draws of a micro-batch on one rank.
        accumulate: Micro-batches of a full window.
        world: Number of ranks.
        rank: This rank.
    """

    plan: DrawPlan
    batch_size: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0

    def __len__(self) -> int:
        last = self.plan.total_draws - (self.plan.steps - 1) * self.plan.window
        return (self.plan.steps - 1) * self.accumulate + self._micros(last)

    def _micros(self, size: int) -> int:
        return -(-size // (self.batch_size * self.world))

    def __getitem__(self, number: int) -> MicroBatch:
        step, micro = divmod(number, self.accumulate)
        window = self.plan.window_draws(step)
        micros = self._micros(len(window))
        first, end, width = _share(len(window), micros * self.world, micro * self.world + self.rank)
        draws = window[-1:].repeat(width)
        draws[: end - first] = window[first:end]
        weights = torch.zeros(width)
        weights[: end - first] = self.accumulate * self.world / len(window)
        return MicroBatch(draws, weights, window, micro, micros)


@dataclass(frozen=True)
class EvalSchedule:
    """Evaluation batches of one rank: every sample once in total, the same number of batches on all ranks."""

    num_samples: int
    batch_size: int
    world: int = 1
    rank: int = 0

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world))

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Return (samples, weights): int64 (b,) and float32 (b,), weight 0 for padding."""
        start = number * self.batch_size * self.world
        size = min(self.batch_size * self.world, self.num_samples - start)
        first, end, width = _share(size, self.world, self.rank)
        samples = torch.full((width,), start + size - 1)
        samples[: end - first] = torch.arange(start + first, start + end)
        weights = torch.zeros(width)
        weights[: end - first] = 1.0
        return samples, weights
