import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from filelock import SoftFileLease

from randlora_pl.run import run_folder as module
from randlora_pl.run.run_folder import acquire, holder, lease_on
from tests.support.leases import of_another_host

FORK = multiprocessing.get_context("forkserver")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "0123456789ab.lock"


def taken(path: Path) -> SoftFileLease:
    lease = lease_on(path)
    assert acquire(lease)
    return lease


def test_one_at_a_time(path: Path) -> None:
    first = taken(path)
    assert not acquire(lease_on(path))
    assert holder(path).startswith(f"process {os.getpid()} on ")
    first.release()
    assert not path.exists() and not holder(path)
    taken(path).release()
    assert not list(path.parent.iterdir())


def _die(path: Path) -> None:
    lease = taken(path)
    assert lease.is_locked
    os._exit(9)  # as SIGKILL: nothing is released


def test_a_dead_owner_on_this_machine_is_succeeded_at_once(path: Path) -> None:
    process = FORK.Process(target=_die, args=(path,))
    process.start()
    process.join()
    assert path.exists() and not holder(path)
    second = taken(path)
    assert not acquire(lease_on(path))
    second.release()
    assert not list(path.parent.iterdir())


def test_an_owner_elsewhere_is_succeeded_after_its_lease(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEASE", 0.5)
    monkeypatch.setattr(module, "BEAT", 0.05)
    of_another_host(path)
    assert holder(path) == f"process {os.getpid()} on elsewhere"
    lease, until = lease_on(path), time.monotonic() + 0.45
    while time.monotonic() < until:
        assert not acquire(lease)
        time.sleep(0.02)
    assert not acquire(lease_on(path)), "nothing has been seen of it"
    time.sleep(0.1)
    assert acquire(lease)
    time.sleep(0.6)
    assert holder(path), "it is renewed"
    lease.release()


def test_a_file_without_an_owner_is_taken_once_it_is_old(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    assert not acquire(lease_on(path)), "its process may be about to name itself"
    os.utime(path, (0, 0))
    taken(path).release()


def test_other_settings_are_somebody_else_s(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_another_host(path)
    monkeypatch.setattr(module, "LEASE", 30.0)
    assert not acquire(lease_on(path))


def _race(path: Path, barrier: Barrier, wins: Path, number: int) -> None:
    lease = lease_on(path)
    barrier.wait()
    if acquire(lease):
        (wins / str(number)).touch()
    barrier.wait()  # every process is still alive


def test_exactly_one_of_many_gets_it(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    wins = tmp_path / "wins"
    wins.mkdir()
    for turn in range(2):
        barrier = FORK.Barrier(4)
        racers = [FORK.Process(target=_race, args=(path, barrier, wins, 10 * turn + n)) for n in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert len(list(wins.iterdir())) == turn + 1, "each turn's winner is dead in the next"
