"""Tables of layers, and options beside their explanation."""

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from randlora_pl.utils.text.formatting import printable
from randlora_pl.utils.text.tables import group_names, table


def layer_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], every: bool) -> str:
    """Return a plain table.

    Args:
        rows: Per layer ``layer``, ``shape`` and the values; None for a missing value.
        columns: Key and title of each value; a group of layers shows the mean, and the range of whole numbers.
        every: If True, one row per layer instead of one per group.
    """
    rows = list(rows)
    shapes = [" x ".join(map(str, row["shape"])) for row in rows]
    groups = (
        {(row["layer"], shape): [place] for place, (row, shape) in enumerate(zip(rows, shapes, strict=True))}
        if every
        else group_names((row["layer"], shape) for row, shape in zip(rows, shapes, strict=True))
    )
    body = [
        [name, shapes[own[0]], str(len(own)), *(_mean([rows[place].get(key) for place in own]) for key in columns)]
        for (name, _), own in groups.items()
    ]
    header = ["layer", "out x in", "layers", *columns.values()]
    return table(header, body, optional=("base's", "layers", "out x in", "rank"))


def _mean(values: Sequence[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if all(isinstance(value, int) for value in known):
        low, high = min(known), max(known)
        return str(low) if low == high else f"{low} to {high}"
    return f"{sum(known) / len(known):.4g}"


def entry(name: str, text: str, indent: int = 2, column: int = 30) -> str:
    """Return one option with its explanation, wrapped beside it.

    Args:
        name: The option as the user types it.
        text: Its explanation.
        indent: Spaces before the name.
        column: Column where the explanation starts.
    """
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
    body = textwrap.fill(printable(text), width, initial_indent=" " * column, subsequent_indent=" " * column)
    head = " " * indent + name
    return head + body[len(head) :] if len(head) < column else f"{head}\n{body}"
