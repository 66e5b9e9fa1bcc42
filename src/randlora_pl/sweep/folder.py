"""The folder of a sweep: its description, the state of its cells, and the progress of a command that runs them."""

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from randlora_pl.run.run_folder import holder
from randlora_pl.sweep import SweepConfig
from randlora_pl.sweep.plan import Cell, Labels
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors, parse_yaml, read_mapping, write_text
from randlora_pl.utils.text import duration

DONE, FAILED, OPEN = "done", "failed", "open"

PRUNED = "pruned"
"""First word of the reason why a cell was ended early, which counts as failed."""

TUNE = "tune"
"""Folder of the search of learning rates in the folder of its sweep."""

REPORT = "report"
"""Folder of the report of a sweep in the folder of the sweep, unless another one is typed."""

FIRST = "first"
"""Folder of the LoRA that a cell starts from in the folder of the cell."""
FIRST_SECONDS = "first/fit_seconds"
"""Metric of a cell: training time of the LoRA that it starts from."""


@dataclass
class SweepFolder:
    """Folder of a sweep."""

    path: Path
    file: str = "sweep.yaml"
    _done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cell_path(self, cell: Cell) -> Path:
        """Return the run folder of a cell."""
        return self.path / "cells" / cell.hash

    def lock(self, cell: Cell) -> Path:
        """Return the lock file of a cell."""
        return self.path / "locks" / f"{cell.hash}.lock"

    def state(self, cell: Cell) -> str:
        """``done``, ``failed`` or ``open``."""
        if self.results(cell):
            return DONE
        return FAILED if (self.cell_path(cell) / "failed.json").is_file() else OPEN

    def results(self, cell: Cell) -> dict[str, Any]:
        """Return the results of a finished cell; empty while it is not finished."""
        if cell.hash not in self._done:
            stored = _read(self.cell_path(cell) / "results.json")
            if stored.get("finished") is not True:
                return {}
            self._done[cell.hash] = stored
        return self._done[cell.hash]

    def failure(self, cell: Cell) -> dict[str, Any]:
        """``reason``, ``time`` and ``tries`` of a cell that failed; empty for any other."""
        return _read(self.cell_path(cell) / "failed.json")

    def worker(self, cell: Cell) -> str:
        """Name the process that runs a cell; empty if none does."""
        return holder(self.lock(cell))

    def begin(self, cell: Cell) -> Path:
        """Make the folder of a cell, with what it is called and what decides its result."""
        labels = cell.labels._asdict() | ({"family": cell.family} if cell.family else {}) | cell.facts
        _write_json(self.cell_path(cell) / "cell.json", labels | {"config": cell.flat})
        return self.cell_path(cell)

    def fail(self, cell: Cell, reason: str, traceback: str = "") -> None:
        """Record that a cell failed, and why."""
        facts: dict[str, Any] = {"reason": " ".join(reason.split()), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        facts |= {"tries": int(self.failure(cell).get("tries", 0)) + 1}
        self.begin(cell)
        _write_json(self.cell_path(cell) / "failed.json", facts | ({"traceback": traceback} if traceback else {}))

    def succeed(self, cell: Cell, keep_adapters: bool) -> None:
        """Remove checkpoints and a former failure of a finished cell, and adapters unless keep_adapters is set."""
        cell_path = self.cell_path(cell)
        for name in ("checkpoints", f"{FIRST}/checkpoints"):
            shutil.rmtree(cell_path / name, ignore_errors=True)
        (cell_path / "failed.json").unlink(missing_ok=True)
        if not keep_adapters:
            for name in ("adapter", "adapter-best", FIRST):
                shutil.rmtree(cell_path / name, ignore_errors=True)

    def open(self, description: SweepConfig, cells: Sequence[Cell]) -> None:
        """Make the folder for a sweep, or extend the grid of the existing one.

        Raises:
            UserError: It holds cells that are called the same and have another config, or something else.
        """
        file = self.path / self.file
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        writing = {name for name in names if name.startswith(f".{self.file}.part")}  # another process begins, too
        if names - writing - {TUNE} and not file.is_file():
            raise UserError(f"{self.path} has no {self.file} and is not empty. Choose another folder with --output.")
        self.check(cells)
        if file.is_file():
            description = description.union(self.description())
        if not file.is_file() or file.read_text(encoding="utf-8") != description.text():
            _write(file, description.text())

    def replace(self, description: SweepConfig, cells: Sequence[Cell]) -> None:
        """Make the folder for a sweep in place of the one there; cells of the same names and other configs go."""
        planned = {tuple(cell.labels): cell.hash for cell in cells}
        for file in sorted((self.path / "cells").glob("*/cell.json")):
            entry, own = _read(file), file.parent.name
            if planned.get(tuple(entry.get(name) for name in Labels._fields), own) != own:
                shutil.rmtree(file.parent)
        _write(self.path / self.file, description.text())

    def description(self) -> SweepConfig:
        """Return the description of the sweep in the folder.

        Raises:
            UserError: The file is missing, or does not describe a sweep.
        """
        file = self.path / self.file
        try:
            return SweepConfig.from_content(parse_yaml(file.read_text(encoding="utf-8")) or {})
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, UserError) as error:
            raise UserError(f"{file} does not describe a sweep: {' '.join(str(error).split())}") from error

    def check(self, cells: Sequence[Cell], free: Sequence[str] = ()) -> None:
        """Raise a UserError with the differences if cells of the same names have other configs here.

        Entries in ``free`` may differ.
        """
        planned = {cell.labels: cell for cell in cells}
        hashes = {cell.hash for cell in cells}
        clashes = []
        for file in sorted((self.path / "cells").glob("*/cell.json")):
            if file.parent.name in hashes:
                continue
            entry = _read(file)
            with suppress(KeyError, ValueError, TypeError):
                cell = planned[Labels(*(entry[name] for name in Labels._fields))]
                if any(entry.get(key) != value for key, value in cell.facts.items()):
                    continue
                there, here = entry.get("config", {}), cell.flat
                names = [name for name in sorted({*there, *here} - {*free}) if there.get(name) != here.get(name)]
                shown = [f"{n} {there.get(n, 'not set')} (here {here.get(n, 'not set')})" for n in names[:3]]
                if names:
                    clashes.append((cell.labels, file.parent, ", ".join(shown) + " ..." * (len(names) > 3)))
        if clashes:
            labels, cell_path, differs = clashes[0]
            more = f" ({len(clashes)} cells in all)" if len(clashes) > 1 else ""
            raise UserError(
                f"{self.path} holds another sweep: {labels} has {differs} in {cell_path}{more}.\n"
                "Choose another --output, or remove those cells. New labels can be added."
            )


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON mapping; empty if there is none, or a damaged one."""
    try:
        return read_mapping(file)
    except (OSError, ValueError):
        return {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    _write(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    with disk_errors(file, ""):
        write_text(file, text)


_SHOWN = 5
"""Cells of other processes in the table."""


class Times:
    """Mean times of finished cells: of the same model, dataset, budget and method, else of fewer of these."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], list[float]] = {}

    def add(self, cell: Cell, seconds: float) -> None:
        """Add a finished cell."""
        for kind in self._kinds(cell):
            self._found.setdefault(kind, []).append(seconds)

    def expected(self, cell: Cell) -> float | None:
        """Return the expected seconds of a cell; None before a similar one has finished."""
        seconds = next(filter(None, map(self._found.get, self._kinds(cell))), None)
        return fmean(seconds) if seconds else None

    @staticmethod
    def _kinds(cell: Cell) -> list[tuple[str, ...]]:
        model, dataset, budget, method, _ = cell.labels
        method = str(cell.facts.get("tunes", method))
        return [(model, method, dataset, budget), (model, method, dataset), (model, method), (model,)]


class Progress:
    """Follows a sweep, on a terminal in a live table. A finished cell costs one look, however many others there are.

    Args:
        cells: The cells to count.
        jobs: Processes that were started together; between two cells they are still counted on.
    """

    def __init__(self, folder: SweepFolder, cells: Sequence[Cell], jobs: int = 1) -> None:
        self.folder, self.jobs = folder, jobs
        self.console = Console(file=sys.stdout)  # also while the output of a cell goes elsewhere
        self.own: tuple[Cell, float] | None = None
        self.times = Times()
        self._states: dict[str, str] = {}
        self._seconds: list[float] = []  # of finished cells
        self._running: list[tuple[Cell, str]] = []
        self._scanned, self._cost = 0.0, 0.0
        self.follow(cells)
        self.scan()
        self.live = Live(  # what cells print goes elsewhere
            console=self.console, get_renderable=self.page, refresh_per_second=2, redirect_stdout=False,
            redirect_stderr=False,
        )  # fmt: skip

    def follow(self, cells: Sequence[Cell]) -> None:
        """Count these cells, of which a search finds more as it continues."""
        self.cells = cells
        self._states = {cell.hash: self._states.get(cell.hash, OPEN) for cell in cells}

    def shown(self) -> AbstractContextManager[Any]:
        """Within it the table is on the terminal; elsewhere nothing happens."""
        return self.live if self.console.is_terminal else nullcontext()

    def started(self, cell: Cell) -> None:
        """Record that a cell begins in this process."""
        self.own = (cell, time.monotonic())

    def ended(self, cell: Cell) -> None:
        """Print one line per finished or failed cell."""
        self.own = None
        self._look(cell)
        self.look()
        self.print_line(cell)

    def print_line(self, cell: Cell) -> None:
        """Print the result of a cell: why it failed, or its accuracy, or the metric of its texts."""
        results = self.folder.results(cell)
        if results:
            took = "" if results.get("cell_seconds") is None else f" in {duration(results['cell_seconds'])}"
            metric, what = results.get("data/metric") or results.get("metric", "acc"), "no accuracy"
            for key, word in ((f"test/{metric}", ""), ("zeroshot/acc", ""), (f"val/{metric}", " on validation")):
                if isinstance(value := results.get(key), float):
                    what = f"{100 * value:.1f} %{word}" if metric == "acc" else f"{metric} {value:.3f}{word}"
                    break
            what += took
        else:
            reason = str(self.folder.failure(cell).get("reason"))
            what = reason if reason.startswith(PRUNED) else f"failed: {reason}"
        done, failed, _ = self.count()
        line = f"{done + failed}/{len(self.cells)}  {cell.labels}: {what}"
        if self.console.is_terminal:
            self.console.print(Text(line, style="red" if what.startswith("failed") else "dim"))  # above the table
        else:
            print(f"{line}; {self.time_left()}", flush=True)

    def look(self, every: float = 10.0) -> list[Cell]:
        """Scan, unless the last scan was a short time ago, in seconds or in units of its own time."""
        recent = time.monotonic() - self._scanned < max(every, 50 * self._cost)  # the folder may be far away
        return [] if recent else self.scan()

    def scan(self) -> list[Cell]:
        """Look at every cell that was not finished the last time; return those that have ended since."""
        start = time.monotonic()
        ended = [cell for cell in self.cells if self._states[cell.hash] != DONE and self._look(cell)]
        left = [cell for cell in self.cells if self._states[cell.hash] != DONE]
        self._running = [(cell, worker) for cell in left if (worker := self.folder.worker(cell))]
        self._scanned = time.monotonic()
        self._cost = self._scanned - start
        return ended

    def _look(self, cell: Cell) -> bool:
        """Look at one cell; return True if its state is another one than before."""
        before, state = self._states[cell.hash], self.folder.state(cell)
        self._states[cell.hash] = state
        seconds = self.folder.results(cell).get("cell_seconds") if state == DONE != before else None
        if seconds:
            self.times.add(cell, seconds)
            self._seconds.append(seconds)
        return state != before

    def count(self) -> tuple[int, int, int]:
        """Return the numbers of cells that are done, failed, and left."""
        states = Counter(self._states.values())
        return states[DONE], states[FAILED], states[OPEN]

    def seconds_left(self) -> float | None:
        """Time for the cells that are left, shared among the processes at work; None before one has finished."""
        *_, left = self.count()
        if left and not self._seconds:
            return None
        return left * fmean(self._seconds or [0.0]) / max(self.jobs, self.at_work())

    def at_work(self) -> int:
        """Return the number of processes that run a cell now, this one included."""
        return len(self._elsewhere()) + (self.own is not None)

    def _elsewhere(self) -> list[tuple[Cell, str]]:
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
        return Group(*rows)
