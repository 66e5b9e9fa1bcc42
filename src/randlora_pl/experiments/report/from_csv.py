"""Reads the runs of a sweep back from the ``cells.csv`` of its report, where the cells themselves are not kept."""

import csv
from pathlib import Path
from typing import Any

from randlora_pl.experiments.report.plan import Key
from randlora_pl.experiments.report.runs import PREFIX, Run
from randlora_pl.utils.errors import UserError

CELLS = "cells.csv"
_LABELS = ("model", "family", "dataset", "budget", "method", "seed", "state", "reason", "accuracy", "zeroshot_accuracy")
_DERIVED = ("rate_chosen_by", "cell")
_TEXTS = ("method", "task", "device", "version", "git_commit")


def read_runs(file: Path) -> list[Run]:
    """Return the runs of a file that `cells_csv` wrote; figures have its six digits.

    Raises:
        UserError: It cannot be read, or is another table.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            return [_run(row) for row in csv.DictReader(stream)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{file} is not a table of cells ({type(error).__name__}: {error}).") from error


def _run(row: dict[str, str]) -> Run:
    key = Key(*(row[name] for name in Key._fields))
    texts = {"method" if name == "adapter" else name: text for name, text in row.items()
             if name not in (*_LABELS, *_DERIVED) and text}  # fmt: skip
    facts: dict[str, Any] = {name: text if name in _TEXTS else _value(text) for name, text in texts.items()}
    facts |= {name: value / 100 for name, value in facts.items() if name.startswith(PREFIX)}
    typed = {"learning_rate": facts["learning_rate"]} if row["rate_chosen_by"] == "typed" else {}
    if facts.get("method") == "LinearProbe" and "learning_rate" in facts:
        facts["head_learning_rate"] = facts.pop("learning_rate")
        typed = {f"head_{name}": value for name, value in typed.items()}
    seed = int(row["seed"]) if row["seed"] else None
    accuracy, zero = (_number(row[name]) for name in ("accuracy", "zeroshot_accuracy"))
    return Run(key, seed, row["state"], row["reason"], row["cell"], row["family"], accuracy, zero, facts, typed)


def _number(text: str) -> float | None:
    return float(text) if text else None


def _value(text: str) -> Any:
    """Return a number if it is one, as `json` would have read it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
