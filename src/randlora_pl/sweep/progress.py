"""Progress of a running sweep: a live table on a terminal, plain lines elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import fmean
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from randlora_pl.sweep.folder import DONE, FAILED, OPEN, PRUNED, SweepFolder
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils.text import duration

_SHOWN = 5


class Times:
    """Mean times of finished cells: of the same model, dataset, budget and method, else of fewer of these."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], list[float]] = {}

    def add(self, cell: Trial, seconds: float) -> None:
        """Add a finished cell."""
        for kind in self._kinds(cell):
            self._found.setdefault(kind, []).append(seconds)

    def expected(self, cell: Trial) -> float | None:
        """Return the expected seconds of a cell; None before a similar one has finished."""
        found = next(filter(None, map(self._found.get, self._kinds(cell))), None)
        return fmean(found) if found else None

    @staticmethod
    def _kinds(cell: Trial) -> list[tuple[str, ...]]:
        model, dataset, budget, method, _ = cell.labels
        method = str(cell.facts.get("tunes", method))
        return [(model, method, dataset, budget), (model, method, dataset), (model, method), (model,)]


class Progress:
    """Follows a sweep. A finished cell costs one look at it, however many others there are.

    Args:
        cells: The cells to count.
        stream: Output stream; a terminal gets a live table.
        jobs: Processes that were started together; between two cells they are still counted on.
    """

    def __init__(
        self, folder: SweepFolder, cells: Sequence[Trial], stream: IO[str] | None = None, jobs: int = 1
    ) -> None:
        self.folder, self.jobs = folder, jobs
        self.stream = sys.stdout if stream is None else stream
        self.console = Console(file=self.stream)
        self.lines: list[str] = []
        self.own: tuple[Trial, float] | None = None
        self.times = Times()
        self._states: dict[str, str] = {}
        self._seconds: list[float] = []  # of finished cells
        self._running: list[tuple[Trial, str]] = []
        self._scanned, self._cost = 0.0, 0.0
        self.follow(cells)
        self.scan()
        self.live = Live(  # what cells print goes elsewhere
            console=self.console, get_renderable=self.page, refresh_per_second=2, redirect_stdout=False,
            redirect_stderr=False,
        )  # fmt: skip

    def follow(self, cells: Sequence[Trial]) -> None:
        """Count these cells, of which a search finds more as it goes on."""
        self.cells = cells
        self._tally = Counter(dict.fromkeys((DONE, FAILED, OPEN), 0))
        self._states = {cell.hash: self._states.get(cell.hash, OPEN) for cell in cells}
        self._tally.update(self._states.values())

    def shown(self) -> AbstractContextManager[Any]:
        """Within it the table is on the terminal; elsewhere nothing happens."""
        return self.live if self.console.is_terminal else nullcontext()

    def started(self, cell: Trial) -> None:
        """Record that a cell begins in this process."""
        self.own = (cell, time.monotonic())

    def ended(self, cell: Trial) -> None:
        """Print one line per finished or failed cell."""
        self.own = None
        self._look(cell)
        self.look()
        self.print_line(cell)

    def print_line(self, cell: Trial) -> None:
        """Print the result of a cell: why it failed, or its accuracy, or the metric of its texts."""
        found = self.folder.results(cell)
        if found:
            took = "" if found.get("cell_seconds") is None else f" in {duration(found['cell_seconds'])}"
            metric, what = found.get("data/metric") or found.get("metric", "acc"), "no accuracy"
            for key, word in ((f"test/{metric}", ""), ("zeroshot/acc", ""), (f"val/{metric}", " on validation")):
                if isinstance(value := found.get(key), float):
                    what = f"{100 * value:.1f} %{word}" if metric == "acc" else f"{metric} {value:.3f}{word}"
                    break
            what += took
        else:
            reason = str(self.folder.failure(cell).get("reason"))
            what = reason if reason.startswith(PRUNED) else f"failed: {reason}"
        done, failed, _ = self.count()
        line = f"{done + failed}/{len(self.cells)}  {cell.labels}: {what}"
        if self.console.is_terminal:
            self.lines = [*self.lines, line][-_SHOWN:]
        else:
            print(f"{line}; {self.time_left()}", file=self.stream, flush=True)

    def look(self, every: float = 10.0) -> list[Trial]:
        """Scan, unless the last scan was a short time ago, in seconds or in units of its own time."""
        recent = time.monotonic() - self._scanned < max(every, 50 * self._cost)  # the folder may be far away
        return [] if recent else self.scan()

    def scan(self) -> list[Trial]:
        """Look at every cell that was not finished the last time; return those that have ended since."""
        start = time.monotonic()
        ended = [cell for cell in self.cells if self._states[cell.hash] != DONE and self._look(cell)]
        left = [cell for cell in self.cells if self._states[cell.hash] != DONE]
        self._running = [(cell, worker) for cell in left if (worker := self.folder.worker(cell))]
        self._scanned = time.monotonic()
        self._cost = self._scanned - start
        return ended

    def _look(self, cell: Trial) -> bool:
        """Look at one cell; return True if its state is another one than before."""
        before, state = self._states[cell.hash], self.folder.state(cell)
        self._states[cell.hash] = state
        self._tally[before] -= 1
        self._tally[state] += 1
        seconds = self.folder.results(cell).get("cell_seconds") if state == DONE != before else None
        if seconds:
            self.times.add(cell, seconds)
            self._seconds.append(seconds)
        return state != before

    def count(self) -> tuple[int, int, int]:
        """Return the numbers of cells that are done, failed, and left."""
        return self._tally[DONE], self._tally[FAILED], self._tally[OPEN]

    def seconds_left(self) -> float | None:
        """Time for the cells that are left, shared among the processes at work; None before one has finished."""
        left = self._tally[OPEN]
        if left and not self._seconds:
            return None
        return left * fmean(self._seconds or [0.0]) / max(self.jobs, self.at_work())

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
        self.look()
        done, failed, left = self.count()
        counts = f"{done} done, {self.at_work()} running, {failed} failed, {left} left; {self.time_left()}"
        rows = [Text(f"{self.folder.path}", style="bold"), Text(counts)]
        if self.own is not None:
            cell, start = self.own
            rows.append(Text(f"> {cell.labels}, for {duration(time.monotonic() - start)}"))
        rows += [Text(f"> {cell.labels}, by {who}") for cell, who in self._elsewhere()[:_SHOWN]]
        rows += [Text(line, style="red" if ": failed: " in line else "dim") for line in self.lines]
        return Group(*rows)
