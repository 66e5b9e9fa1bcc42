"""Progress of long commands on the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
