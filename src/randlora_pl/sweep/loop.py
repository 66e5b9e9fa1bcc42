"""The loop of one process over the cells of a sweep."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import SoftFileLease

from randlora_pl.sweep.folder import DONE, FAILED, SweepFolder
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils.errors import LostProcessError, Terminated, UserError
from randlora_pl.utils.files import lease as leases
from randlora_pl.utils.files.atomic_output import disk_errors
from randlora_pl.utils.files.lease import acquired, lease_on

if TYPE_CHECKING:
    from randlora_pl.sweep.progress import Progress

_PAUSE = 1.0
"""Seconds between two looks at what other processes are doing."""

Run = Callable[[Trial, Path], bool | None]
"""Runs a cell in its folder to its end, or raises; returns True after a SIGTERM that only Lightning saw."""


@dataclass
class Outcome:
    """Results of one process: cells that it finished, and that failed here.

    Attributes:
        elsewhere: Cells that another process was running at the end.
        stopped: Why it stopped before the end, empty where it did not.
    """

    done: list[Trial] = field(default_factory=list)
    failed: list[Trial] = field(default_factory=list)
    elsewhere: int = 0
    stopped: str = ""


@dataclass
class Loop:
    """One process at work on a sweep.

    Attributes:
        cells: The process's part of the cells, in order.
        watch: Progress to show.
        fatal: Whether an error would meet the next cell as well.
        retry_failed: Cells that have failed before are tried once more.
        deadline: Value of ``time.monotonic`` after which no cell begins.
        seconds: Expected time of a cell, so that none begins that would end after the deadline.
        keep_adapters: Whether finished cells keep their adapter.
        dropped: Whether a cell is not needed any more.
    """

    folder: SweepFolder
    cells: Sequence[Trial]
    run: Run
    watch: "Progress | None" = None
    fatal: Callable[[Exception], bool] = lambda error: False
    retry_failed: bool = False
    deadline: float | None = None
    seconds: Callable[[Trial], float] = lambda cell: 0.0
    keep_adapters: bool = True
    dropped: Callable[[Trial], bool] = lambda cell: False
    _leases: dict[str, SoftFileLease] = field(default_factory=dict)
    _tries: dict[str, int] = field(default_factory=dict)

    def work(self) -> Outcome:
        """Run every cell that is neither finished nor running elsewhere, until none is left.

        Raises:
            UserError: The disk is full, or the folder cannot be written.
            Terminated: A SIGTERM came while Lightning handled it, and the cell had no step left.
            KeyboardInterrupt: As the cell raised it; the cell is free for others.
        """
        for cell in self.cells:
            self._tries.setdefault(cell.hash, int(self.folder.failure(cell).get("tries", 0)))
        outcome = Outcome()
        left, patience = list(self.cells), time.monotonic() + 2 * leases.LEASE
        while left:
            passed: list[Trial] = []
            for cell in left:
                if self._settled(cell) or self.dropped(cell):
                    continue
                if self.deadline is not None and time.monotonic() + self.seconds(cell) > self.deadline:
                    outcome.stopped = "the time is up"
                    return outcome
                if not self._one(cell, outcome):
                    passed.append(cell)
            if passed:
                running = [bool(self.folder.worker(cell)) for cell in passed]
                if any(running) or len(passed) < len(left):
                    patience = time.monotonic() + 2 * leases.LEASE  # by then every dead owner has been succeeded
                if all(running) or time.monotonic() > patience:
                    outcome.elsewhere = len(passed)
                    return outcome
                time.sleep(_PAUSE)
            left = passed
        return outcome

    def _settled(self, cell: Trial) -> bool:
        state = self.folder.state(cell)
        if state == FAILED and self.retry_failed:  # unless another process has just done so
            return bool(self.folder.failure(cell).get("tries", 0) != self._tries[cell.hash])
        return state in (DONE, FAILED)

    def _one(self, cell: Trial, outcome: Outcome) -> bool:
        """Run a cell unless another process does; return True if it is settled now."""
        lease = self._leases.setdefault(cell.hash, lease_on(self.folder.lock(cell)))
        with disk_errors(self.folder.path, ""):
            if not acquired(lease):
                return False
        try:
            if not self._settled(cell):  # another process may have ended it before the lock was taken
                self._run(cell, outcome)
        finally:
            lease.release()
        return True

    def _run(self, cell: Trial, outcome: Outcome) -> None:
        if self.watch:
            self.watch.started(cell)
        failed, terminated = "", False
        try:
            terminated = bool(self.run(cell, self.folder.begin(cell)))
            if not self.folder.results(cell):
                raise UserError("it ended before its last step")
            self.folder.succeed(cell, self.keep_adapters)
        except Exception as error:  # whatever a cell dies of, the others can go on
            if self.fatal(error):
                raise
            ours = isinstance(error, UserError | LostProcessError)
            failed = str(error) if ours else f"{type(error).__name__}: {error}"
            self.folder.fail(cell, failed, "" if isinstance(error, UserError) else traceback.format_exc())
        (outcome.failed if failed else outcome.done).append(cell)
        if self.watch:
            self.watch.ended(cell)
        if terminated:
            raise Terminated
