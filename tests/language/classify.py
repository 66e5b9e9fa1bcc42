"""Tiny encoders with random weights, and toy files of labelled texts."""

import csv
import itertools
import json
import random
from pathlib import Path
from typing import Any

from randlora_pl.adapters import RandLoRA
from randlora_pl.language.data import LabelledTexts
from randlora_pl.language.tasks.classification import TextClassificationTask

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300,
    "max_position_embeddings": 400, "initializer_range": 0.2,
}  # fmt: skip
GOOD, BAD = ("great", "fine", "lovely", "good"), ("awful", "dull", "poor", "bad")


def reviews() -> list[tuple[str, str]]:
    """Short opinions with their classes, in a mixed order."""
    nouns = ("film", "plot", "cast", "song", "play", "tale")
    found = [
        (f"a {word} {noun}, {often}", name)
        for name, words in (("positive", GOOD), ("negative", BAD))
        for word, noun, often in itertools.product(words, nouns, ("ever", "yes", "so it is", "they say"))
    ]
    random.Random(0).shuffle(found)
    return found


def write_csv(file: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return file


def write_reviews(folder: Path) -> Path:
    """The toy task as CSV files; the texts of the test are not among those that are learned."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = reviews()
    for name, part in (("test", rows[:41]), ("val", rows[41:61]), ("train", rows[61:])):
        write_csv(folder / f"{name}.csv", part)
    return folder


def write_scores(folder: Path, count: int = 23) -> Path:
    """Pairs with scores as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text_a": "a" * (place % 5 + 1), "text_b": "b" * (place % 7 + 1), "label": round(place % 11 / 2, 1)}
        for place in range(count)
    ]
    for name, part in (("train", rows), ("test", rows[:9])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def make(kind: str = "roberta", **options: Any) -> TextClassificationTask:
    """A tiny encoder with random weights, not built yet."""
    defaults: dict[str, Any] = {
        "name": kind, "pretrained": "random", "config_overrides": SHAPE | options.pop("overrides", {}),
        "adapter": RandLoRA(rank=8), "learning_rate": 1e-2,
    }  # fmt: skip
    return TextClassificationTask(**(defaults | options))


TYPED = [
    *("--model", "TextClassificationTask", "--model.name", "roberta", "--model.pretrained", "random"),
    *("--model.config_overrides", json.dumps(SHAPE), "--model.adapter", "RandLoRA", "--model.adapter.rank", "8"),
]
"""A tiny encoder as words of a command."""


def labelled(folder: Path, **options: Any) -> LabelledTexts:
    """The toy task, or other files."""
    return LabelledTexts(**({"dataset": "csv", "root": str(folder), "batch_size": 8, "steps": 3} | options))
