import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from randlora_pl.experiments.sweep import locks
from randlora_pl.experiments.sweep.locks import Lock, acquire, alive, holder

FORK = multiprocessing.get_context("forkserver")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "0123456789ab.lock"


@contextmanager
def on(machine: str) -> Iterator[None]:
    """Whatever happens inside happens on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "_machine", lambda: machine)
        yield


def taken(path: Path) -> Lock:
    lock = acquire(path)
    assert lock is not None
    return lock


def grow_old(path: Path) -> None:
    past = time.time() - locks.EXPIRES - 60
    os.utime(path, (past, past))


def test_one_at_a_time(path: Path) -> None:
    first = taken(path)
    assert acquire(path) is None
    assert (found := holder(path)) and found["pid"] == os.getpid() and found["host"]
    first.release()
    assert not path.exists() and holder(path) is None
    taken(path).release()
    assert not list(path.parent.iterdir())


def _die(path: Path) -> None:
    taken(path)
    os._exit(9)  # as SIGKILL: nothing is released


def test_a_dead_owner_on_this_machine_is_succeeded_at_once(path: Path) -> None:
    process = FORK.Process(target=_die, args=(path,))
    process.start()
    process.join()
    assert path.exists() and holder(path) is None
    second = taken(path)
    assert path.exists(), "the cell has a lock all the time"
    assert acquire(path) is None
    second.release()
    assert not list(path.parent.iterdir())


def test_a_number_used_again_by_another_process_is_not_the_owner(path: Path) -> None:
    taken(path)
    owner = json.loads(path.read_text())
    assert alive(path, owner)
    assert not alive(path, owner | {"started": "1"})


def test_an_owner_elsewhere_counts_as_dead_after_a_while(path: Path) -> None:
    with on("a"):
        first = taken(path)
    with on("b"):
        assert acquire(path) is None, "it has just been seen"
        grow_old(path)
        second = taken(path)
    with on("c"):
        assert acquire(path) is None
    first.release()  # it lives after all, and must not take the lock away
    with on("c"):
        assert (found := holder(path)) and found["token"] == second.token
        grow_old(second.file)
        third = taken(path)
        assert acquire(path) is None
    third.release()
    assert not path.exists()


def test_signs_of_life_keep_a_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with on("a"):
        lock = taken(path)
    grow_old(path)
    with on("b"):
        until = time.monotonic() + 10
        while holder(path) is None and time.monotonic() < until:
            time.sleep(0.01)
        assert acquire(path) is None
    lock.release()


def test_a_damaged_lock_expires_too(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps({"machine": locks._machine(), "pid": "12a"}))
    assert acquire(path) is None
    path.write_text("{")
    assert acquire(path) is None
    grow_old(path)
    taken(path).release()
    assert not path.exists()


def test_a_lock_that_may_only_be_read_expires_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with on("a"):
        lock = taken(path)

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "read only")

    with on("b"), monkeypatch.context() as patch:
        patch.setattr(Path, "touch", refuse)
        assert holder(path) is not None
        grow_old(path)
        assert holder(path) is None
    lock.release()


def test_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise PermissionError(1, "not supported")

    monkeypatch.setattr(os, "link", no_links)
    lock = taken(path)
    assert acquire(path) is None
    lock.release()
    assert not list(path.parent.iterdir())


def test_a_lost_answer_of_the_file_server_is_no_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lost(source: Path, target: Path) -> None:
        link(source, target)
        raise OSError(5, "the answer did not come")

    monkeypatch.setattr(os, "link", lost)
    taken(path).release()


def test_a_full_disk_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space"):
        acquire(path)
    assert not list(path.parent.iterdir())


def _race(path: Path, barrier: Barrier, wins: Path, number: int) -> None:
    barrier.wait()
    lock = acquire(path)
    if lock is not None:
        (wins / str(number)).touch()
    barrier.wait()  # nobody has ended yet


@pytest.mark.parametrize("dead", [False, True])
def test_exactly_one_of_many_gets_it(path: Path, tmp_path: Path, dead: bool) -> None:
    if dead:
        process = FORK.Process(target=_die, args=(path,))
        process.start()
        process.join()
    wins = tmp_path / "wins"
    wins.mkdir()
    for turn in range(3):
        barrier = FORK.Barrier(4)
        racers = [FORK.Process(target=_race, args=(path, barrier, wins, 10 * turn + n)) for n in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len(list(wins.iterdir())) == turn + 1, "each turn's winner is dead in the next"
