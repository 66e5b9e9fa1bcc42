"""Numbered batches of texts: what a `Loader` hands over for training, validation and tests."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from randlora_pl.data.loader import Batch
from randlora_pl.data.plan import EvalSchedule, TrainSchedule
from randlora_pl.language.encode import IGNORED, Encoded, collate
from randlora_pl.language.generate import learned_columns

MULTIPLE = 8
"""Batches are padded to a multiple of this, as in the paper's scripts."""


class Tokens:
    """Encoded samples in three flat arrays: hundreds of thousands of Python lists would take gigabytes.

    Args:
        encoded: The samples.

    Attributes:
        counted: int64 (samples,), tokens of each that are learned; the first of a text is predicted by nothing.
    """

    def __init__(self, encoded: Iterable[Encoded]) -> None:
        samples = list(encoded)
        lengths = [len(sample.input_ids) for sample in samples]
        self._ends = np.cumsum([0, *lengths])
        self._ids = np.fromiter((number for sample in samples for number in sample.input_ids), np.int32)
        self._labels = np.fromiter((label for sample in samples for label in sample.labels), np.int32)
        self._labels[self._ends[:-1]] = IGNORED  # the padding before a text would predict its first token
        counts = [sum(label != IGNORED for label in sample.labels[1:]) for sample in samples]
        self.counted = torch.tensor(counts, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @property
    def lengths(self) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Tokens of each sample."""
        return np.diff(self._ends)

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return len(self._ids)

    def __getitem__(self, number: int) -> Encoded:
        here = slice(self._ends[number], self._ends[number + 1])
        return Encoded(self._ids[here].tolist(), self._labels[here].tolist(), int(here.stop - here.start))


@dataclass(frozen=True)
class TrainTexts:
    """Training batches of one rank: a dictionary for each micro-batch.

    ``input_ids``, ``attention_mask`` and ``labels`` (b, length) int64, ``weight`` (b,) float32, ``draw`` and ``index``
    (b,) int64; ``columns``: see `learned_columns`; ``window_samples`` and ``window_tokens``: samples and learned tokens
    of the whole window, all ranks and micro-batches; ``micro`` and ``micros``: place in the window and micro-batches of
    it. The window's mean loss over samples is the sum of weight x loss (see `MicroBatch`).
    """

    tokens: Tokens
    schedule: TrainSchedule
    pad: int

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        micro = self.schedule[number]
        plan = self.schedule.plan
        places = plan.samples(micro.draws)
        texts = collate([self.tokens[place] for place in places.tolist()], self.pad, "left", MULTIPLE)
        return {
            **texts,
            "columns": learned_columns(texts["labels"]),
            "weight": micro.weights,
            "draw": micro.draws,
            "index": places,
            "window_samples": len(micro.window),
            "window_tokens": int(self.tokens.counted[plan.samples(micro.window)].sum()),
            "micro": micro.micro,
            "micros": micro.micros,
        }


@dataclass(frozen=True)
class EvalTexts:
    """Evaluation batches of one rank: tokens as above, ``columns``, ``weight`` (0 for padding) and ``index``.

    Args:
        tokens: The samples.
        schedule: Which of them are in which batch.
        order: The place of each in the order of evaluation; neighbours of one length need little padding.
        pad: Number to pad with.
    """

    tokens: Tokens
    schedule: EvalSchedule
    order: Sequence[int]
    pad: int

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        places, weights = self.schedule[number]
        samples = [self.order[place] for place in places.tolist()]
        texts = collate([self.tokens[place] for place in samples], self.pad, "left", MULTIPLE)
        columns = learned_columns(texts["labels"])
        return {**texts, "columns": columns, "weight": weights, "index": torch.tensor(samples)}


def by_length(tokens: Tokens) -> list[int]:
    """The samples' places, the longest first, so that memory runs out at once or not at all."""
    order: list[int] = np.argsort(-tokens.lengths, kind="stable").tolist()
    return order
