"""Generated texts of a test, gathered from all processes for a file of answers and for corpus scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from randlora_pl.language.datasets.sources import Item
from randlora_pl.language.metrics.text_scores import generation_scores


def gathered(own: Mapping[int, str]) -> dict[int, str]:
    """Gather the texts of all processes by their numbers, in order; every process must call it with its own."""
    parts: list[Any] = [dict(own)]
    if dist.is_available() and dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, dict(own))
    return dict(sorted((number, text) for part in parts for number, text in part.items()))


def cleaned(item: Item, text: str) -> str:
    """Return the scored part of a text: the first paragraph of a description, all of an answer."""
    return paragraph(text) if item.references else text


def paragraph(text: str) -> str:
    """Return the first paragraph.

    The scripts that E2E's come from stop at an empty line, too (their second end of text, token 628 of GPT-2).
    """
    return text.partition("\n\n")[0].strip()


def corpus_scores(items: Sequence[Item], texts: Mapping[int, str]) -> dict[str, float]:
    """Score all texts that have references; empty if none has.

    Scores of a corpus are not means over texts or batches, so one process needs the texts by the number of their item.

    Raises:
        UserError: The package sacrebleu or pycocoevalcap is missing.
    """
    scored = [(text, items[number].references) for number, text in texts.items() if items[number].references]
    return generation_scores(*zip(*scored, strict=True)) if scored else {}
