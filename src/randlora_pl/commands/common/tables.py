"""Tables of layers, options beside their explanation, and the progress of long commands."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def counting(shown: bool, text: str = "{task.completed:,} images decoded", total: int | None = None) -> Iterator[Any]:
    """Yield a progress function that counts images; it prints only for long commands on a terminal.

    Args:
        shown: True if the command may be long.
        text: Text to show, with ``{task.completed}``.
        total: Final count; None if unknown.
    """
    if not (shown and sys.stderr.isatty()):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(text), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
