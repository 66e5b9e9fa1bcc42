"""Generated texts of a test, gathered from all processes for a file of answers and for corpus scores."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from randlora_pl.language.datasets.sources import Item
from randlora_pl.language.metrics.text_scores import generation_scores

log = logging.getLogger("randlora_pl")


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

    They belong to the corpus and are not means of texts or batches, so one process needs all of them. METEOR is left
    out with a warning if its program is missing.

    Args:
        items: The questions of the tests.
        texts: Generated texts by the number of their question.

    Raises:
        UserError: The package sacrebleu or pycocoevalcap is missing.
    """
    scored = [(text, items[number].references) for number, text in texts.items() if items[number].references]
    if not scored:
        return {}
    found = generation_scores([text for text, _ in scored], [references for _, references in scored])
    if missing := found.pop("METEOR missing", None):
        log.warning("METEOR is left out. %s", missing)
    return {name: float(value) for name, value in found.items()}
