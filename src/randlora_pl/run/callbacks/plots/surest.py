"""Most confident mistakes of a test: wrong predictions with the highest probabilities."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Prediction:
    """Prediction of a test image.

    Attributes:
        probability: Probability of the predicted class.
        index: Index of the image in the test set.
        label: True class.
        guess: Predicted class.
        image: Model input, (3, H, W) float32 on the CPU.
    """

    probability: float
    index: int
    label: int
    guess: int
    image: Tensor


def wrong_first(mistakes: list[Prediction], samples: list[Prediction]) -> list[Prediction]:
    """Return as many predictions as there are samples: wrong ones first, the most confident in front.

    Up to half of the samples make room for mistakes, so that these are seen at any accuracy.

    Args:
        mistakes: Mistakes of the whole test, most confident first.
        samples: Predictions of all classes.
    """
    first = mistakes[: (len(samples) + 1) // 2]
    seen = {one.index for one in first}
    both = [*first, *(one for one in samples if one.index not in seen)][: len(samples)]
    wrong = sorted((one for one in both if one.guess != one.label), key=lambda one: (-one.probability, one.index))
    return wrong + sorted((one for one in both if one.guess == one.label), key=lambda one: one.index)


class Surest:
    """Most confident mistakes, independent of the order and sizes of batches.

    Args:
        most: Number of mistakes to keep.

    Attributes:
        mistakes: Most confident mistakes so far, in order.
        wrong: Number of mistakes so far.
        seen: Number of predictions so far.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.mistakes: list[Prediction] = []
        self.wrong = self.seen = 0

    def add(self, images: Tensor, index: Tensor, labels: Tensor, logits: Tensor, counts: Tensor) -> None:
        """Add the predictions of a batch.

        Args:
            images: Model inputs, (b, 3, H, W).
            index: Indices in the test set, (b,).
            labels: True classes, (b,).
            logits: Logits, (b, classes).
            counts: (b,) bool, False for padding of the batch.
        """
        probabilities, guesses = logits.float().softmax(1).nan_to_num(0.0).max(1)
        wrong = (counts & (guesses != labels)).nonzero()[:, 0]
        self.seen, self.wrong = self.seen + int(counts.sum()), self.wrong + len(wrong)
        order = probabilities[wrong].argsort(descending=True, stable=True)
        for position in wrong[order][: self.most].tolist():
            image = images[position].detach().to("cpu", torch.float32, copy=True)  # a view would keep the whole batch
            numbers = int(index[position]), int(labels[position]), int(guesses[position])
            self._keep([Prediction(float(probabilities[position]), *numbers, image)])

    def heading(self) -> str:
        """Return a heading with the numbers of mistakes found and kept."""
        among = f"among {self.seen:,} test images"
        if self.wrong <= 1:
            return f"{'the only mistake' if self.wrong else 'no mistake'} {among}"
        if self.wrong <= self.most:
            return f"all {self.wrong} mistakes {among}, most confident first"
        return f"the {self.most} most confident of {self.wrong:,} mistakes {among}"

    def gathered(self) -> "Surest":
        """Return the mistakes of all processes; every process must call it."""
        parts: list[Any] = [self]
        if dist.is_available() and dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self)
        found = Surest(self.most)
        for part in parts:
            found.seen, found.wrong = found.seen + part.seen, found.wrong + part.wrong
            found._keep(part.mistakes)
        return found

    def _keep(self, more: list[Prediction]) -> None:
        both = sorted([*self.mistakes, *more], key=lambda mistake: (-mistake.probability, mistake.index))
        self.mistakes = both[: self.most]
