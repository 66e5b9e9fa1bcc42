"""Reads the runs of a sweep back from the ``cells.csv`` of its report, where the cells themselves are not kept."""

from pathlib import Path
from typing import Any

from randlora_pl.experiments.report.plan import Key
from randlora_pl.experiments.report.runs import PREFIX, Run
from randlora_pl.utils.errors import UserError

CELLS = "cells.csv"
_LABELS = ("model", "family", "dataset", "budget", "method", "state", "reason", "cell", "rate_chosen_by")
_TEXTS = (*_LABELS, "adapter", "task", "device", "version", "git_commit")
_RUN = (*_LABELS, "seed", "accuracy", "zeroshot_accuracy")
"""Columns that are not figures of ``results.json``."""


def read_runs(file: Path) -> list[Run]:
    """Return the runs of a file that `cells_csv` wrote; figures have its six digits.

    Raises:
        UserError: It cannot be read, or is another table.
    """
    import pandas  # a fifth of a second

    try:
        with file.open(encoding="utf-8", newline="") as stream:
            table = pandas.read_csv(
                stream, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=False, na_values=[""]
            ).convert_dtypes()
        rows = table.to_dict("records")
        return [_run({name: value for name, value in row.items() if value is not pandas.NA}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a table of cells ({type(error).__name__}: {error}).") from error


def _run(row: dict[str, Any]) -> Run:
    """Return the run of a row without its empty cells."""
    facts = {"method" if name == "adapter" else name: value for name, value in row.items() if name not in _RUN}
    facts |= {name: value / 100 for name, value in facts.items() if name.startswith(PREFIX)}
    typed = {"learning_rate": facts["learning_rate"]} if row.get("rate_chosen_by") == "typed" else {}
    if facts.get("method") == "LinearProbe" and "learning_rate" in facts:
        facts["head_learning_rate"] = facts.pop("learning_rate")
        typed = {f"head_{name}": value for name, value in typed.items()}
    return Run(
        Key(*(row[name] for name in Key._fields)), row.get("seed"), row["state"], row.get("reason", ""),
        row.get("cell", ""), row.get("family", ""), row.get("accuracy"), row.get("zeroshot_accuracy"), facts, typed,
    )  # fmt: skip
