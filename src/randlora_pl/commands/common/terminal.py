"""Checks of arguments, devices and advice, tables, options beside their explanation, and progress."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from randlora_pl.run.error_messages import out_of_memory
from randlora_pl.utils.errors import TooLargeImageError, UnreadableImageError, UserError
from randlora_pl.utils.text import group_names, printable, table


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


def print_json(found: object) -> int:
    """Print a listing for another program; return the exit code of the command."""
    print(json.dumps(found, indent=2, ensure_ascii=False, default=str))
    return 0


def spelled(name: str) -> str:
    """Return an option as the user types it."""
    return f"--{name.replace('_', '-')}"


def check_output(path: Path, overwrite: bool | None = None) -> None:
    """Refuse an output that exists, unless ``--overwrite`` is given; None if the command has no such option."""
    if path.exists() and not overwrite:
        instead = "nothing is overwritten" if overwrite is None else "or --overwrite to replace it"
        raise UserError(f"{path} exists; give another --output, {instead}.")


def check_parent(path: Path) -> None:
    """Refuse a file whose folder does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"The folder {path.parent} does not exist; make it first: mkdir -p {path.parent}")


def pick_device(name: str) -> Any:
    """Return a device of this machine; ``auto`` selects the fastest one, others are refused if they do not exist."""
    import torch

    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise UserError(f"--device {name} is not on this machine; there is {', '.join(there)}.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give cpu, cuda, cuda:1 and so on.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} is not on this machine; the last one is {device.type}:{count - 1}.")
    return device


@contextmanager
def advised(smaller: str, unreadable: str = "", too_large: str = "") -> Iterator[None]:
    """Raise errors of one line, with advice, for what can go wrong while a model works.

    Args:
        smaller: Option to try if memory runs out.
        unreadable: What to do about an image that cannot be read.
        too_large: What to do about an image that is too large, if something else.
    """
    try:
        yield
    except UnreadableImageError as error:
        hint = too_large if too_large and isinstance(error, TooLargeImageError) else unreadable
        raise UserError(error.what, hint, error.where) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory; try {smaller}") from error
