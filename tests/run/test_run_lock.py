"""One process trains in a run folder; a dead one is succeeded, at once on this machine, elsewhere after its lease."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.run import run_folder as leases
from randlora_pl.run.callbacks import HeldLock
from randlora_pl.run.run_folder import FILE, locked
from randlora_pl.utils.errors import LostProcessError, UserError
from tests.support.cli import SMALL, Refused, Run
from tests.support.leases import of_another_host

HOLD = "import sys, time; from pathlib import Path; from randlora_pl.run.run_folder import locked\n" + (
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(99)"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE", 1.0)
    monkeypatch.setattr(leases, "BEAT", 0.1)


def test_a_second_process_is_refused_with_the_first_one_s_number_and_host(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        monkey = pytest.MonkeyPatch()
        monkey.setattr(leases, "LEASE", 60.0)  # the holder's
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is training"), locked(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        start = time.monotonic()
        with locked(tmp_path):
            assert time.monotonic() - start < 1, "without waiting for the end of its lease"
        monkey.undo()
    finally:
        holder.kill()
        holder.wait()
    assert not (tmp_path / FILE).exists()


def test_a_silent_owner_elsewhere_is_succeeded_after_its_lease(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_another_host(tmp_path / FILE)
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start >= 1
    assert "elsewhere" in capsys.readouterr().err


def test_a_living_owner_elsewhere_is_not_succeeded(tmp_path: Path) -> None:
    file, stop = of_another_host(tmp_path / FILE), threading.Event()

    def renew() -> None:
        while not stop.wait(0.1):
            file.touch()

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        with pytest.raises(UserError, match="elsewhere"), locked(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()


def test_fit_takes_the_lock_and_resume_is_refused_before_anything_is_read(
    run: Run, refused: Refused, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / "runs" / "one" / "again")
    folder = tmp_path / "runs" / "one" / "again"
    (folder / "results.json").unlink()
    with locked(folder):
        assert "runs/one/again" in refused("fit", "--resume", "runs/one/again")
        assert "is training" in refused("fit", *SMALL, "--run.name", "one", "--resume", "auto")
    seen: list[bool] = []
    monkeypatch.setattr("randlora_pl.run.stages.fit", lambda app, lock: seen.append((app.folder / FILE).is_file()))
    for words in (("--resume", "runs/one/again"), (*SMALL, "--run.name", "new")):
        assert run("fit", *words).code == 0
    assert seen == [True, True] and not list(tmp_path.glob(f"runs/*/2*/{FILE}"))


def test_only_the_first_process_of_a_job_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        monkeypatch.setenv("LOCAL_RANK", "1")
        with locked(tmp_path):
            monkeypatch.delenv("LOCAL_RANK")
        assert (tmp_path / FILE).is_file()


def test_a_training_that_lost_its_lock_ends(tmp_path: Path) -> None:
    nothing: Any = None
    with locked(tmp_path) as lease:
        callback = HeldLock(lease, tmp_path)
        callback.on_train_batch_end(nothing, nothing, nothing, nothing, 0)
        other = of_another_host(tmp_path / "other" / FILE)
        other.replace(tmp_path / FILE)
        until = time.monotonic() + 5
        while lease.compromise is None and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(LostProcessError, match="owner-changed"):
            callback.on_train_batch_end(nothing, nothing, nothing, nothing, 0)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(self: object, blocking: bool) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.SoftFileLease.acquire", acquire)
    with pytest.raises(UserError, match="written"), locked(tmp_path):
        pass
