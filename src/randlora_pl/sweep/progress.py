"""Progress of a running sweep: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from randlora_pl.sweep.estimate import Estimator
from randlora_pl.sweep.folder import DONE, FAILED, SweepFolder
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils.text.formatting import duration

RESCAN = 10.0
"""Seconds between two looks at the folder, which may be far away."""
_SHOWN = 5


class Progress:
    """Follows a sweep.

    Args:
        cells: The cells to count.
        stream: Output stream; a terminal gets a live table.
        jobs: Processes that were started together; between two cells they are still counted on.
    """

    def __init__(
        self,
        folder: SweepFolder,
        cells: Sequence[Trial],
        estimator: Estimator,
        stream: IO[str] | None = None,
        jobs: int = 1,
    ) -> None:
        self.folder, self.cells, self.estimator, self.jobs = folder, cells, estimator, jobs
        self.stream = sys.stdout if stream is None else stream
        self.console = Console(file=self.stream)
        self.lines: list[str] = []
        self.own: tuple[Trial, float] | None = None
        self._scanned = 0.0
        self._states: dict[str, str] = {}
        self._running: list[tuple[Trial, str]] = []
        self.live = Live(  # what cells print goes elsewhere
            console=self.console, get_renderable=self.page, refresh_per_second=2, redirect_stdout=False,
            redirect_stderr=False,
        )  # fmt: skip

    def shown(self) -> AbstractContextManager[Any]:
        """Within it the table is on the terminal; elsewhere nothing happens."""
        return self.live if self.console.is_terminal else nullcontext()

    def started(self, cell: Trial) -> None:
        """Record that a cell begins in this process."""
        self.own = (cell, time.monotonic())

    def ended(self, cell: Trial, seconds: float, failed: str = "") -> None:
        """Print one line per finished or failed cell."""
        self.own = None
        self.estimator.refresh()
        self.scan()
        done = f"{accuracy(self.folder, cell)} in {duration(seconds)}"
        self.print_line(cell, f"failed: {failed}" if failed else done)

    def print_line(self, cell: Trial, what: str) -> None:
        """Print a line about a cell."""
        done, failed, _ = self.count()
        line = f"{done + failed}/{len(self.cells)}  {cell.labels}: {what}"
        if self.console.is_terminal:
            self.lines = [*self.lines, line][-_SHOWN:]
        else:
            print(f"{line}; {self.time_left()}", file=self.stream, flush=True)

    def scan(self) -> None:
        """Look at every cell that was not finished the last time."""
        self._scanned = time.monotonic()
        for cell in self.cells:
            if self._states.get(cell.hash) != DONE:
                self._states[cell.hash] = self.folder.state(cell)
        open_cells = [cell for cell in self.cells if self._states[cell.hash] != DONE]
        self._running = [(cell, worker) for cell in open_cells if (worker := self.folder.worker(cell))]

    def count(self) -> tuple[int, int, int]:
        """Return the numbers of cells that are done, failed, and left."""
        if not self._states:
            self.scan()
        states = list(self._states.values())
        done, failed = states.count(DONE), states.count(FAILED)
        return done, failed, len(states) - done - failed

    def seconds_left(self) -> float | None:
        """Time for the cells that are left, shared among the processes at work; None where too little is known."""
        left = [cell for cell in self.cells if self._states.get(cell.hash) not in (DONE, FAILED)]
        known = [e.seconds for cell in left if (e := self.estimator.measured(cell)) is not None and e.seconds]
        if left and not known:
            return None
        return sum(known) * len(left) / max(1, len(known)) / max(self.jobs, self.at_work())

    def at_work(self) -> int:
        """Return the number of processes that run a cell now, this one included."""
        return len(self._elsewhere()) + (self.own is not None)

    def _elsewhere(self) -> list[tuple[Trial, str]]:
        return [pair for pair in self._running if self.own is None or pair[0].hash != self.own[0].hash]

    def time_left(self) -> str:
        """Return the progress as text."""
        seconds = self.seconds_left()
        return "time left not known yet" if seconds is None else f"{duration(seconds)} left"

    def page(self) -> RenderableType:
        """Return the live table."""
        if time.monotonic() - self._scanned > RESCAN:
            self.scan()
        done, failed, left = self.count()
        table = Table(box=None, show_header=True, pad_edge=False)
        for name in ("done", "running", "failed", "left", "time left"):
            table.add_column(name, justify="right")
        seconds = self.seconds_left()
        time_left = "?" if seconds is None else duration(seconds)
        table.add_row(str(done), str(self.at_work()), str(failed), str(left), time_left)
        rows: list[RenderableType] = [Text(f"{self.folder.path}", style="bold"), table]
        if self.own is not None:
            cell, start = self.own
            rows.append(Text(f"> {cell.labels}, for {duration(time.monotonic() - start)}"))
        rows += [Text(f"> {cell.labels}, by {who}") for cell, who in self._elsewhere()[:_SHOWN]]
        rows += [Text(line, style="red" if ": failed: " in line else "dim") for line in self.lines]
        return Group(*rows)


def accuracy(folder: SweepFolder, cell: Trial) -> str:
    """Return the result of a finished cell as text: its accuracy, or the metric of its texts."""
    found = folder.results(cell)
    metric = found.get("data/metric", "acc")
    for key, word in ((f"test/{metric}", ""), ("zeroshot/acc", ""), (f"val/{metric}", " on validation")):
        if isinstance(found.get(key), float):
            return (f"{100 * found[key]:.1f} %" if metric == "acc" else f"{metric} {found[key]:.3f}") + word
    return "no accuracy"
