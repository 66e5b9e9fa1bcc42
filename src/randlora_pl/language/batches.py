"""Encoded texts, and numbered batches of them: what a `Loader` hands over for training, validation and tests."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from randlora_pl.data.base import Part, text_part
from randlora_pl.data.loader import Batch, EvalSchedule, TrainSchedule
from randlora_pl.language.decoder import learned_positions
from randlora_pl.language.tokenization import IGNORED, Encoded, Side, collate, collate_sentences, joined


class TextSamples:
    """Encoded samples in flat arrays: hundreds of thousands of Python lists would take gigabytes.

    Args:
        columns: The numbers of each sample, by name; ``input_ids`` is one of them.

    Attributes:
        lengths: int64 (samples,), tokens of each.
    """

    def __init__(self, columns: Mapping[str, Sequence[Sequence[int]]]) -> None:
        self.lengths = np.array([len(row) for row in columns["input_ids"]], np.int64)
        self._ends = np.cumsum([0, *self.lengths])
        self._columns = {name: np.fromiter(chain.from_iterable(rows), np.int32) for name, rows in columns.items()}

    def __len__(self) -> int:
        return len(self.lengths)

    def by_length(self) -> list[int]:
        """Return the indices, the longest first, so that memory runs out at once or not at all."""
        order: list[int] = np.argsort(-self.lengths, kind="stable").tolist()
        return order

    def part(self) -> Part:
        """Return the samples as numbers, to compare the processes of a job."""
        labels = {"label": labels.numpy()} if (labels := getattr(self, "labels", None)) is not None else {}
        return text_part(self._columns | labels, self._ends)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return a padded batch of the samples at these indices."""
        raise NotImplementedError

    def step_entries(self, indices: Tensor) -> Batch:
        """Return what each micro-batch needs of all samples of its optimizer step, at indices (samples,)."""
        return {}

    def _row(self, number: int) -> dict[str, list[int]]:
        here = slice(self._ends[number], self._ends[number + 1])
        return {name: values[here].tolist() for name, values in self._columns.items()}


def pack(samples: Sequence[Encoded], size: int) -> list[Encoded]:
    """Return samples joined to rows of at most ``size`` tokens, which no sample exceeds.

    The longest sample is placed first, each in the row with the least room that it fits into, so that the same samples
    give the same rows.
    """
    rows: list[list[Encoded]] = []
    rows_with: list[list[list[Encoded]]] = [[] for _ in range(size + 1)]  # by their room
    rooms = 0  # a bit for each that some row has
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        large = rooms >> length
        room = length + (large & -large).bit_length() - 1 if large else size
        if not large:
            rows.append([])
            rows_with[size].append(rows[-1])
        row = rows_with[room].pop()
        row.append(sample)
        rows_with[room - length].append(row)
        rooms = (rooms if rows_with[room] else rooms & ~(1 << room)) | 1 << (room - length)
    return [joined(row) for row in rows]


class Tokens(TextSamples):
    """Prompts with their completions.

    Args:
        encoded: The samples.
        pad: Number to pad with.
        side: Side of the padding: ``right`` to learn, ``left`` to write.

    Attributes:
        counted: int64 (samples,), tokens of each that are learned; the first of a text is predicted by nothing.
    """

    def __init__(self, encoded: Iterable[Encoded], pad: int, side: Side = "right") -> None:
        samples = list(encoded)
        columns = {name: [getattr(sample, name) for sample in samples] for name in ("input_ids", "labels")}
        if any(sample.positions for sample in samples):
            columns["positions"] = [sample.positions or range(len(sample.input_ids)) for sample in samples]
        super().__init__(columns)
        self._columns["labels"][self._ends[:-1]] = IGNORED  # predicted by nothing
        counts = [sum(label != IGNORED for label in sample.labels[1:]) for sample in samples]
        self.counted = torch.tensor(counts, dtype=torch.int64)
        self.pad, self.side = pad, side

    def __getitem__(self, number: int) -> Encoded:
        return Encoded(**self._row(number), full_length=int(self.lengths[number]))

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return a padded batch: ``input_ids``, ``attention_mask`` and ``labels`` (b, length) int64, and ``padding``.

        With the `learned_positions`, for which a device would have to wait. Rows of joined samples come with
        ``position_ids`` (b, length).
        """
        texts = collate([self[index] for index in indices], self.pad, self.side)
        return {**texts, "learned": learned_positions(texts["labels"]), "padding": self.side}

    def step_entries(self, indices: Tensor) -> Batch:
        """Return the samples and learned tokens of all ranks and micro-batches."""
        return {"step_samples": len(indices), "step_tokens": int(self.counted[indices].sum())}


class Sentences(TextSamples):
    """Labelled sentences or pairs of them.

    Args:
        encoded: Output of the tokenizer for each, without padding; one or more.
        labels: Class numbers, or scores.
        classes: True for class numbers.
        tokenizer: The one that encoded them.
        pad: Number to pad with.

    Attributes:
        labels: int64 class numbers or float32 scores, (samples,).
    """

    def __init__(
        self,
        encoded: Sequence[Mapping[str, list[int]]],
        labels: Sequence[float],
        classes: bool,
        tokenizer: Any,
        pad: int,
    ) -> None:
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded[0]]
        super().__init__({name: [row[name] for row in encoded] for name in names})
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64 if classes else torch.float32)
        self.tokenizer, self.pad = tokenizer, pad

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return {**self._row(number), "attention_mask": [1] * int(self.lengths[number])}

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return a batch padded on the right: the tokenizer's inputs (b, length) int64 and ``labels`` (b,)."""
        texts = collate_sentences(self.tokenizer, [self[index] for index in indices], self.pad)
        return {**texts, "labels": self.labels[torch.tensor(indices)]}


@dataclass(frozen=True)
class TextTrainBatches:
    """Training batches of one rank: a dictionary for each micro-batch.

    Entries: what `TextSamples.batch` and `TextSamples.step_entries` give, ``weight`` (b,) float32, ``position`` and
    ``index`` (b,) int64, ``micro_batch`` and ``micro_batches`` (see `MicroBatch`). Weights include ``class_weights``.
    """

    samples: TextSamples
    schedule: TrainSchedule
    class_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        micro_batch = self.schedule[number]
        plan = self.schedule.plan
        indices = plan.samples(micro_batch.positions)
        batch = self.samples.batch(indices.tolist())
        batch |= self.samples.step_entries(plan.samples(micro_batch.step_positions))
        return batch | micro_batch.entries(indices, batch["labels"], self.class_weights)


@dataclass(frozen=True)
class TextEvalBatches:
    """Evaluation batches of one rank: entries of `TextSamples.batch`, ``weight`` (0 for padding) and ``index``.

    ``order`` has the samples in the order of evaluation; neighbors of one length need little padding.
    """

    samples: TextSamples
    schedule: EvalSchedule
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        indices, weights = self.schedule[number]
        samples = [self.order[index] for index in indices.tolist()]
        return {**self.samples.batch(samples), "weight": weights, "index": torch.tensor(samples)}
