"""Labelled sentences and pairs as tokens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from randlora_pl.language.data.batches import MULTIPLE, Samples
from randlora_pl.language.models.tokenization import collate_sentences

_INPUTS = ("input_ids", "token_type_ids")


class Sentences(Samples):
    """Labelled sentences or pairs of them.

    Args:
        encoded: Output of the tokenizer for each, without padding; one or more.
        labels: Class numbers, or scores.
        classes: Whether they are class numbers.
        tokenizer: The one that encoded them.
        pad: Number to pad with.

    Attributes:
        labels: int64 class numbers or float32 scores, (samples,).
    """

    def __init__(
        self,
        encoded: Iterable[Mapping[str, list[int]]],
        labels: Sequence[float],
        classes: bool,
        tokenizer: Any,
        pad: int,
    ) -> None:
        rows = list(encoded)
        super().__init__({name: [row[name] for row in rows] for name in _INPUTS if name in rows[0]})
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64 if classes else torch.float32)
        self.tokenizer, self.pad = tokenizer, pad

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        return {**self._row(number), "attention_mask": [1] * int(self.lengths[number])}

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch padded on the right: the tokenizer's inputs (b, length) int64 and ``labels`` (b,)."""
        labels = self.labels[torch.tensor(places)].tolist()
        return collate_sentences(self.tokenizer, [self[place] for place in places], labels, self.pad, MULTIPLE)
