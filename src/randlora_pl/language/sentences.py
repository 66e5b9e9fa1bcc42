"""Labelled sentences and pairs as tokens, and numbered batches of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from randlora_pl.data.loader import Batch
from randlora_pl.data.plan import EvalSchedule, TrainSchedule
from randlora_pl.language.batches import MULTIPLE
from randlora_pl.language.encode import collate_sentences

_INPUTS = ("input_ids", "token_type_ids")


class Sentences:
    """Encoded samples in flat arrays: a hundred thousand Python lists would take a gigabyte.

    Args:
        encoded: What the tokenizer gave for each, without padding.
        labels: Class numbers, or scores.
        classes: Whether they are class numbers.

    Attributes:
        lengths: int64 (samples,), tokens of each.
        labels: int64 class numbers or float32 scores, (samples,).
    """

    def __init__(self, encoded: Iterable[Mapping[str, list[int]]], labels: Sequence[float], classes: bool) -> None:
        rows = list(encoded)
        self.lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)
        self._ends = np.cumsum([0, *self.lengths])
        self._inputs = {
            name: np.fromiter((number for row in rows for number in row[name]), np.int32)
            for name in _INPUTS
            if rows and name in rows[0]
        }
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64 if classes else torch.float32)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of all samples."""
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        here = slice(self._ends[number], self._ends[number + 1])
        inputs = {name: values[here].tolist() for name, values in self._inputs.items()}
        return {**inputs, "attention_mask": [1] * int(self.lengths[number])}

    def batch(self, places: Sequence[int], tokenizer: Any, pad: int) -> dict[str, Tensor]:
        """Some of them, padded on the right (see `collate_sentences`)."""
        labels = self.labels[torch.tensor(places)].tolist()
        return collate_sentences(tokenizer, [self[place] for place in places], labels, pad, MULTIPLE)


@dataclass(frozen=True)
class TrainSentences:
    """Training batches of one rank: a dictionary for each micro-batch.

    The tokenizer's inputs (b, length) int64, ``labels`` (b,), ``weight`` (b,) float32, ``draw`` and ``index`` (b,)
    int64; ``micro`` and ``micros``: place in the window and micro-batches of it. The window's mean loss is the sum of
    weight x loss (see `MicroBatch`).
    """

    sentences: Sentences
    schedule: TrainSchedule
    tokenizer: Any
    pad: int

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        micro = self.schedule[number]
        places = self.schedule.plan.samples(micro.draws)
        return {
            **self.sentences.batch(places.tolist(), self.tokenizer, self.pad),
            "weight": micro.weights,
            "draw": micro.draws,
            "index": places,
            "micro": micro.micro,
            "micros": micro.micros,
        }


@dataclass(frozen=True)
class EvalSentences:
    """Evaluation batches of one rank: inputs and ``labels`` as above, ``weight`` (0 for padding) and ``index``.

    Args:
        sentences: The samples.
        schedule: Which of them are in which batch.
        order: The place of each in the order of evaluation; neighbours of one length need little padding.
        tokenizer: The one that encoded them.
        pad: Number to pad with.
    """

    sentences: Sentences
    schedule: EvalSchedule
    order: Sequence[int]
    tokenizer: Any
    pad: int

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        places, weights = self.schedule[number]
        samples = [self.order[place] for place in places.tolist()]
        inputs = self.sentences.batch(samples, self.tokenizer, self.pad)
        return {**inputs, "weight": weights, "index": torch.tensor(samples)}
