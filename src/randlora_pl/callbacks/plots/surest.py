"""The surest mistakes of a test: wrong predictions of the highest probabilities."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction.

    Attributes:
        probability: Of the predicted class.
        index: Place of the image in the test set.
        label: Its true class.
        guess: The predicted class.
        image: (3, H, W) float32 on the CPU, as the model saw it.
    """

    probability: float
    index: int
    label: int
    guess: int
    image: Tensor

    @property
    def rank(self) -> tuple[float, int]:
        """What mistakes are ordered by, the surest first; equally sure ones by their places."""
        return -self.probability, self.index


class Surest:
    """Keeps the surest mistakes, whatever the order and the sizes of batches.

    Args:
        most: Mistakes that are kept.

    Attributes:
        mistakes: The surest so far, in order.
        wrong: Mistakes so far.
        seen: Predictions so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.mistakes: list[Mistake] = []
        self.wrong = self.seen = 0

    def add(self, images: Tensor, index: Tensor, labels: Tensor, logits: Tensor, counts: Tensor) -> None:
        """Take the predictions of a batch.

        Args:
            images: (b, 3, H, W).
            index: (b,) places in the test set.
            labels: (b,) true classes.
            logits: (b, classes).
            counts: (b,) bool, False for what only fills the batch.
        """
        probabilities, guesses = logits.float().softmax(1).nan_to_num(0.0).max(1)
        wrong = (counts & (guesses != labels)).nonzero()[:, 0]
        self.seen, self.wrong = self.seen + int(counts.sum()), self.wrong + len(wrong)
        order = probabilities[wrong].argsort(descending=True, stable=True)
        for place in wrong[order][: self.most].tolist():
            image = images[place].detach().to("cpu", torch.float32, copy=True)  # a view would keep the whole batch
            numbers = int(index[place]), int(labels[place]), int(guesses[place])
            self._keep([Mistake(float(probabilities[place]), *numbers, image)])

    def in_words(self) -> str:
        """Return a heading: how many mistakes there are, and how many are kept."""
        among = f"among {self.seen:,} test images"
        if self.wrong <= 1:
            return f"{'the only mistake' if self.wrong else 'no mistake'} {among}"
        if self.wrong <= self.most:
            return f"all {self.wrong} mistakes {among}, the surest first"
        return f"the {self.most} surest of {self.wrong:,} mistakes {among}"

    def gathered(self) -> "Surest":
        """Return the surest mistakes of all processes; every one of them must call it."""
        parts: list[Any] = [self]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self)
        found = Surest(self.most)
        for part in parts:
            found.seen, found.wrong = found.seen + part.seen, found.wrong + part.wrong
            found._keep(part.mistakes)
        return found

    def _keep(self, more: list[Mistake]) -> None:
        self.mistakes = sorted([*self.mistakes, *more], key=lambda mistake: mistake.rank)[: self.most]
