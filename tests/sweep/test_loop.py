import errno
import io
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from rich.console import Console

from randlora_pl.run import run_folder as leases
from randlora_pl.run.run_folder import acquire, lease_on
from randlora_pl.sweep import loop as module
from randlora_pl.sweep.folder import DONE, FAILED, OPEN, Progress, SweepFolder, Times
from randlora_pl.sweep.loop import Loop
from randlora_pl.sweep.plan import Cell
from randlora_pl.utils.errors import Terminated, UserError
from tests.support.leases import of_another_host
from tests.sweep.grids import cells_of

CELLS = cells_of(seeds=[1, 2])


class Fake:
    """Runs nothing and notes what was asked."""

    def __init__(self, **errors: Exception) -> None:
        self.ran: list[str] = []
        self.errors = errors

    def __call__(self, cell: Cell, place: Path) -> None:
        self.ran.append(str(cell.labels))
        if error := self.errors.get(cell.labels.method.partition("-")[0]):
            raise error
        (place / "results.json").write_text('{"finished": true}')


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path)


def done(folder: SweepFolder) -> list[Cell]:
    return [cell for cell in CELLS if folder.state(cell) == DONE]


def test_each_cell_once(folder: SweepFolder) -> None:
    fake = Fake()
    Loop(folder, CELLS, fake).work()
    assert fake.ran == [str(cell.labels) for cell in CELLS] and done(folder) == CELLS
    Loop(folder, CELLS, fake).work()
    assert len(fake.ran) == 4
    assert not list((folder.path / "locks").iterdir())


def test_a_failed_cell_is_recorded_and_retried_on_request_only(folder: SweepFolder) -> None:
    fake = Fake(LoRA=UserError("no memory\nfor it"))
    Loop(folder, CELLS, fake).work()
    failed = [cell for cell in CELLS if cell.labels.method == "LoRA-4"]
    assert [cell for cell in CELLS if folder.state(cell) == FAILED] == failed and len(done(folder)) == 2
    assert folder.failure(failed[0])["reason"] == "no memory for it" and folder.failure(failed[0])["tries"] == 1
    Loop(folder, CELLS, fake).work()
    assert len(fake.ran) == 4
    Loop(folder, CELLS, fake, retry_failed=True).work()
    assert len(fake.ran) == 6 and folder.failure(failed[0])["tries"] == 2
    fake.errors = {}
    Loop(folder, CELLS, fake, retry_failed=True).work()
    assert done(folder) == CELLS and not folder.failure(failed[0])


def test_an_early_end_is_a_failure_and_an_unknown_error_keeps_its_traceback(folder: SweepFolder) -> None:
    Loop(folder, CELLS[:1], lambda cell, place: None).work()
    assert "before its last step" in folder.failure(CELLS[0])["reason"]
    Loop(folder, CELLS[:2], Fake(LoRA=ZeroDivisionError("oh"))).work()
    told = folder.failure(CELLS[1])
    assert told["reason"] == "ZeroDivisionError: oh" and "test_loop.py" in told["traceback"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt("later"), OSError(errno.ENOSPC, "No space left on device")])
def test_what_ends_everything_leaves_the_cell_open(folder: SweepFolder, stop: BaseException) -> None:
    def run(cell: Cell, place: Path) -> None:
        raise stop

    with pytest.raises(type(stop)):
        Loop(folder, CELLS, run).work()
    assert folder.state(CELLS[0]) == OPEN and acquire(lease_on(folder.lock(CELLS[0])))


def test_neither_a_signal_in_a_finished_cell_nor_the_end_of_the_time_begins_another(folder: SweepFolder) -> None:
    fake = Fake()
    late = Loop(folder, CELLS, fake, deadline=time.monotonic() + 10)
    late.watch.times = Mock(expected=lambda cell: 60.0 * (cell == CELLS[1]))
    assert late.work().stopped and fake.ran == [str(CELLS[0].labels)]
    with pytest.raises(Terminated):
        Loop(folder, CELLS, lambda cell, place: fake(cell, place) or True).work()
    assert fake.ran[1:] == [str(CELLS[1].labels)] and folder.state(CELLS[1]) == DONE


def test_cells_of_others_are_left_to_them(folder: SweepFolder) -> None:
    theirs = lease_on(folder.lock(CELLS[0]))
    assert acquire(theirs)
    outcome = Loop(folder, CELLS, Fake()).work()
    assert outcome.elsewhere == 1 and done(folder) == CELLS[1:]
    theirs.release()
    assert not Loop(folder, CELLS, Fake()).work().elsewhere and done(folder) == CELLS


@pytest.mark.slow
@pytest.mark.parametrize("age", [0, 100, None])
def test_a_lock_without_a_living_owner_is_taken_over_after_a_lease(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, age: int | None
) -> None:
    monkeypatch.setattr(leases, "LEASE", 3.0)
    monkeypatch.setattr(module, "PAUSE", 0.05)
    file = folder.lock(CELLS[0])
    file.parent.mkdir(parents=True)
    if age is None:  # a dead owner elsewhere
        of_another_host(file, age=100)
    else:  # its process was killed before it named itself
        file.touch()
        os.utime(file, (time.time() - age,) * 2)
    start = time.monotonic()
    Loop(folder, CELLS, Fake()).work()
    assert done(folder) == CELLS
    assert (time.monotonic() - start >= 3) == (age != 100)


def test_a_cell_that_another_ended_before_the_lock_was_taken_is_not_done_again(folder: SweepFolder) -> None:
    fake = Fake()
    loop = Loop(folder, CELLS[:1], fake)
    states = iter([OPEN, DONE])
    folder.state = lambda cell: next(states)  # type: ignore[method-assign]
    loop.work()
    assert fake.ran == []


def test_a_retry_by_another_process_is_enough(folder: SweepFolder) -> None:
    fake = Fake(LoRA=UserError("no"))
    Loop(folder, CELLS, fake).work()

    def run(cell: Cell, place: Path) -> None:
        other = next(c for c in CELLS if c.labels == cell.labels._replace(seed=2))
        folder.fail(other, "no, too")  # meanwhile, by another process
        raise UserError("no")

    Loop(folder, CELLS, run, retry_failed=True).work()
    assert [folder.failure(cell)["tries"] for cell in CELLS if folder.state(cell) == FAILED] == [2, 2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def finish(folder: SweepFolder, cell: Cell) -> None:
    figures = {"finished": True, "test/acc": 0.5, "cell_seconds": 60.0}
    (folder.begin(cell) / "results.json").write_text(json.dumps(figures))


def test_plain_lines_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SweepFolder(tmp_path)
    progress = Progress(folder, CELLS)
    with progress.shown():
        progress.started(CELLS[0])
        finish(folder, CELLS[0])
        progress.ended(CELLS[0])
        folder.fail(CELLS[1], "no luck")
        progress.ended(CELLS[1])
        scores = {"finished": True, "test/pearson": 0.5, "data/metric": "pearson", "cell_seconds": 60.0}
        (folder.begin(CELLS[2]) / "results.json").write_text(json.dumps(scores))
        progress.ended(CELLS[2])
    assert capsys.readouterr().out.splitlines() == [
        "1/4  tiny, digits, 2-shot, RandLoRA-6, seed 1: 50.0 % in 60 s; 3 min left",
        "2/4  tiny, digits, 2-shot, LoRA-4, seed 1: failed: no luck; 2 min left",
        "3/4  tiny, digits, 2-shot, RandLoRA-6, seed 2: pearson 0.500 in 60 s; 60 s left",
    ]


def test_processes_between_two_cells_are_counted_on(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    finish(folder, CELLS[0])
    progress = Progress(folder, CELLS, jobs=2)
    assert progress.at_work() == 0 and progress.seconds_left() == pytest.approx(3 * 60 / 2)


def test_a_live_table_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    folder = SweepFolder(tmp_path)
    finish(folder, CELLS[0])
    folder.fail(CELLS[1], "no luck")
    lease = lease_on(folder.lock(CELLS[2]))
    assert acquire(lease)
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    progress = Progress(folder, CELLS)
    progress.started(CELLS[3])
    progress.print_line(CELLS[1])
    with progress.shown():
        pass
    lease.release()
    assert "failed: no luck" in stream.getvalue()
    plain = io.StringIO()
    Console(file=plain, width=120).print(progress.page())
    lines = plain.getvalue().splitlines()
    assert lines[1] == "1 done, 2 running, 1 failed, 2 left; 60 s left"
    assert lines[2].startswith(f"> {CELLS[3].labels}, for") and str(CELLS[2].labels) in lines[3]


def test_times_are_of_the_nearest_finished_cells() -> None:
    datasets = {"digits": None, "long": {"dataset": "digits", "steps": 20}}
    cells = cells_of(seeds=[1, 2], budgets=[2, 4], datasets=datasets)
    first, other = cells[:2]  # of two methods
    longer = next(cell for cell in cells if cell.labels[1:4] == ("long", *first.labels[2:4]))
    times = Times()
    assert times.expected(first) is None
    times.add(first, 10.0)
    times.add(longer, 20.0)
    assert [times.expected(cell) for cell in (first, longer, other)] == [10.0, 20.0, 15.0]


def test_progress_is_linear_in_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looks at cells, at their files and at those who run them, of a whole sweep."""
    count = 100
    cells = [replace(CELLS[0], labels=CELLS[0].labels._replace(seed=n), flat={"n": n}) for n in range(count)]
    folder = SweepFolder(tmp_path)

    def run(cell: Cell, place: Path) -> None:
        (place / "results.json").write_text('{"finished": true, "test/acc": 0.5, "cell_seconds": 1.0}')

    loop = Loop(folder, cells, run)
    counted = {name: Mock(wraps=getattr(folder, name)) for name in ("state", "worker", "results", "failure")}
    for name, counting in counted.items():
        monkeypatch.setattr(folder, name, counting)
    expected = counted["expected"] = Mock(wraps=loop.watch.times.expected)
    monkeypatch.setattr(loop.watch.times, "expected", expected)
    loop.work()
    assert capsys.readouterr().out.count("\n") == count and loop.watch.count() == (count, 0, 0)
    assert max(counting.call_count for counting in counted.values()) <= 12 * count
