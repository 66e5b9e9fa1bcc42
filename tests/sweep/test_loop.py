import os
import time
from pathlib import Path

import pytest

from randlora_pl.sweep import loop as module
from randlora_pl.sweep.folder import DONE, FAILED, OPEN, SweepFolder
from randlora_pl.sweep.loop import Loop
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils import lease as leases
from randlora_pl.utils.errors import Terminated, UserError
from randlora_pl.utils.lease import acquired, lease_on
from tests.support.leases import of_another_host
from tests.sweep.grids import cells_of

CELLS = cells_of(seeds=[1, 2])


class Fake:
    """Runs nothing and notes what was asked."""

    def __init__(self, **errors: Exception) -> None:
        self.ran: list[str] = []
        self.errors = errors

    def __call__(self, cell: Trial, place: Path) -> None:
        self.ran.append(str(cell.labels))
        if error := self.errors.get(cell.labels.method.partition("-")[0]):
            raise error
        (place / "results.json").write_text('{"finished": true}')


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path)


def test_each_cell_once(folder: SweepFolder) -> None:
    fake = Fake()
    outcome = Loop(folder, CELLS, fake).work()
    assert fake.ran == [str(cell.labels) for cell in CELLS] and outcome.done == CELLS
    again = Loop(folder, CELLS, fake).work()
    assert len(fake.ran) == 4 and again.done == []
    assert not list((folder.path / "locks").iterdir())


def test_a_failed_cell_is_recorded_and_retried_on_request_only(folder: SweepFolder) -> None:
    fake = Fake(LoRA=UserError("no memory\nfor it"))
    outcome = Loop(folder, CELLS, fake).work()
    failed = [cell for cell in CELLS if cell.labels.method == "LoRA-4"]
    assert outcome.failed == failed and len(outcome.done) == 2
    assert folder.failure(failed[0])["reason"] == "no memory for it" and folder.failure(failed[0])["tries"] == 1
    Loop(folder, CELLS, fake).work()
    assert len(fake.ran) == 4
    Loop(folder, CELLS, fake, retry_failed=True).work()
    assert len(fake.ran) == 6 and folder.failure(failed[0])["tries"] == 2
    fake.errors = {}
    assert Loop(folder, CELLS, fake, retry_failed=True).work().done == failed
    assert all(folder.state(cell) == DONE for cell in CELLS) and not folder.failure(failed[0])


def test_an_unknown_error_keeps_its_traceback(folder: SweepFolder) -> None:
    Loop(folder, CELLS[:2], Fake(LoRA=ZeroDivisionError("oh"))).work()
    told = folder.failure(CELLS[1])
    assert told["reason"] == "ZeroDivisionError: oh" and "test_loop.py" in told["traceback"]


def test_a_cell_that_ends_early_has_failed(folder: SweepFolder) -> None:
    Loop(folder, CELLS[:1], lambda cell, place: None).work()
    assert "before its last step" in folder.failure(CELLS[0])["reason"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt("later"), UserError("the disk is full")])
def test_what_ends_everything_leaves_the_cell_open(folder: SweepFolder, stop: BaseException) -> None:
    def run(cell: Trial, place: Path) -> None:
        raise stop

    with pytest.raises(type(stop)):
        Loop(folder, CELLS, run, fatal=lambda error: "full" in str(error)).work()
    assert folder.state(CELLS[0]) == OPEN and acquired(lease_on(folder.lock(CELLS[0])))


def test_a_signal_in_a_finished_cell_begins_no_other(folder: SweepFolder) -> None:
    fake = Fake()
    with pytest.raises(Terminated):
        Loop(folder, CELLS, lambda cell, place: fake(cell, place) or True).work()
    assert fake.ran == [str(CELLS[0].labels)] and folder.state(CELLS[0]) == DONE


def test_time_that_is_up_begins_nothing(folder: SweepFolder) -> None:
    fake = Fake()
    late = Loop(folder, CELLS, fake, deadline=time.monotonic() + 10, seconds=lambda cell: 60.0 * (cell == CELLS[1]))
    assert late.work().stopped and fake.ran == [str(CELLS[0].labels)]


def test_cells_of_others_are_left_to_them(folder: SweepFolder) -> None:
    theirs = lease_on(folder.lock(CELLS[0]))
    assert acquired(theirs)
    outcome = Loop(folder, CELLS, Fake()).work()
    assert outcome.elsewhere == 1 and len(outcome.done) == 3
    theirs.release()
    assert Loop(folder, CELLS, Fake()).work().done == CELLS[:1]


@pytest.mark.slow
@pytest.mark.parametrize("age", [0, 100])
def test_a_lock_without_an_owner_is_taken_over_after_a_lease(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch, age: int
) -> None:
    monkeypatch.setattr(leases, "LEASE", 3.0)
    monkeypatch.setattr(module, "_PAUSE", 0.05)
    file = folder.lock(CELLS[0])
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (time.time() - age,) * 2)
    start = time.monotonic()
    assert len(Loop(folder, CELLS, Fake()).work().done) == 4
    assert (time.monotonic() - start >= 3) == (age == 0)  # its process was killed before it named itself


@pytest.mark.slow
def test_a_dead_owner_elsewhere_is_succeeded_after_its_lease(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE", 3.0)
    monkeypatch.setattr(module, "_PAUSE", 0.05)
    of_another_host(folder.lock(CELLS[0]), age=100)
    start = time.monotonic()
    assert len(Loop(folder, CELLS, Fake()).work().done) == 4 and time.monotonic() - start >= 3


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

    def run(cell: Trial, place: Path) -> None:
        other = next(c for c in CELLS if c.labels == cell.labels._replace(seed=2))
        folder.fail(other, "no, too")  # meanwhile, by another process
        raise UserError("no")

    outcome = Loop(folder, CELLS, run, retry_failed=True).work()
    assert len(outcome.failed) == 1
    assert [folder.failure(cell)["tries"] for cell in CELLS if folder.state(cell) == FAILED] == [2, 2]
