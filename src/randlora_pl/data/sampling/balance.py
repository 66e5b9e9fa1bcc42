"""Classes of different sizes: loss weights, equal sampling of classes, and warnings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from randlora_pl.utils import rng

RATIO = 10
"""Minimum ratio of the largest to the smallest class for a warning."""


def balance_text(balance: str | None) -> str:
    """Return the start summary's text with a leading comma; "" for None."""
    words = {"weights": ", losses weighted by class", "sampler": ", classes drawn equally often"}
    return words[balance] if balance else ""


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return the weight of each class, float32 (classes,): inverse to its frequency, with mean 1 over the samples.

    Classes without samples have weight 0.
    """
    counts = torch.bincount(labels, minlength=classes)
    scale = len(labels) / (counts > 0).sum()
    return torch.where(counts > 0, scale / counts.clamp(min=1), 0.0).float()


@lru_cache(maxsize=4096)
def _order(seed: int, label: int, size: int, epoch: int) -> Tensor:
    """Return the sample order of one class; cached, because a run needs few classes and epochs at a time."""
    return rng.permutation(seed, f"order of class {label}", size, part=epoch)


@dataclass(frozen=True)
class ClassDraws:
    """A sample order that selects every class with samples equally often.

    Attributes:
        indices: int64 (samples,), sample indices grouped by class.
        starts: int64 (classes,), start of each class in ``indices``; classes without samples are omitted.
        counts: int64 (classes,), number of samples per class.
    """

    indices: Tensor
    starts: Tensor
    counts: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> "ClassDraws":
        """Group samples by class."""
        counts = torch.unique(labels, return_counts=True)[1]
        return cls(torch.argsort(labels, stable=True), counts.cumsum(0) - counts, counts)

    def samples(self, seed: int, positions: Tensor, sampling: str) -> Tensor:
        """Return the sample at each position, a pure function of the seed and the position.

        Args:
            seed: Seed of the order.
            positions: int64 positions in the sample order, of any shape.
            sampling: ``with_replacement``: each position selects a random class and a random sample of it. ``epochs``:
                all classes take turns, in a new order each round; a class's samples are used up before any is repeated.
        """
        if sampling == "with_replacement":
            labels = rng.integers(seed, "class", positions, len(self.counts))
            chosen = (rng.words(seed, "order", positions) * self.counts[labels]) >> 32
            return self.indices[self.starts[labels] + chosen]
        rounds = torch.div(positions, len(self.counts), rounding_mode="floor")
        samples = torch.empty_like(positions)
        for number in torch.unique(rounds).tolist():
            here = rounds == number
            turns = rng.permutation(seed, "class", len(self.counts), part=number)
            turn = turns[positions[here] % len(self.counts)].tolist()
            samples[here] = torch.tensor([self._sample(seed, label, number) for label in turn])
        return samples

    def _sample(self, seed: int, label: int, number: int) -> int:
        """Return the sample of a class in a round; a class is drawn once in each round."""
        size = int(self.counts[label])
        epoch, turn = divmod(number, size)
        return int(self.indices[self.starts[label] + _order(seed, label, size, epoch)[turn]])


def remarks(
    labels: Mapping[str, NDArray[np.int64]], names: Sequence[str], unit: str = "images", balanced: bool = False
) -> list[str]:
    """Return one line about classes missing in splits, and one about training classes of very different sizes.

    ``labels`` has the class of each sample, by split; empty splits are ignored. ``balanced`` training corrects for
    different sizes.
    """
    counts = {split: np.bincount(found, minlength=len(names)) for split, found in labels.items() if len(found)}
    lines = []
    if lacking := {split: np.flatnonzero(count == 0) for split, count in counts.items() if (count == 0).any()}:
        parts = ", ".join(f"{len(empty)} in {split}" for split, empty in lacking.items())
        first = names[int(next(iter(lacking.values()))[0])]
        unseen = "; val/acc measures only the classes that val has" if "val" in lacking else ""
        lines.append(
            f"classes without {unit}: {parts} (of {len(names)} classes; the first: {first!r}){unseen}; add {unit}"
        )
    train = counts.get("train", np.zeros(0, dtype=np.int64))
    some = np.flatnonzero(train)
    if not balanced and len(some) and train[some].max() >= RATIO * train[some].min():
        low, high = int(some[train[some].argmin()]), int(train.argmax())
        sizes = f"{names[high]!r} has {train[high]:,} training {unit}, {names[low]!r} {train[low]:,}"
        lines.append(f"classes differ in size: {sizes}; accuracy favors the large ones, see --data.balance weights")
    return lines
