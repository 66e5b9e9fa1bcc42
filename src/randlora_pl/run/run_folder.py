"""Run folders: new ones, the one to resume, and the locks of folders, which also cells of a sweep have.

A lock is a lease on a file: one process owns a folder, and another takes over if the owner is dead. A lease also works
on network folders, where locks of the operating system may apply to one machine only. A dead owner on this machine is
detected at once. An owner on another machine is dead if its file does not change for `LEASE` seconds while another
process observes it, which needs no common clock.
"""

import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from randlora_pl.run.parallel.launch import broadcast_decision, decide_first, process_rank
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.run_files import ADAPTER, LAST, find_adapter, results_of, runs_in, unlink_latest

LEASE = 60.0
"""Seconds without a renewal after which the owner is considered dead."""

BEAT = 2.0
"""Seconds between two renewals."""


def lease_on(file: Path) -> SoftFileLease:
    """Return the lease on a file, not yet acquired."""
    return SoftFileLease(file, lease_duration=LEASE, heartbeat_interval=BEAT)


def acquire(lease: SoftFileLease) -> bool:
    """Acquire a lease and return True, unless another process owns it.

    To take over from a dead owner on another machine, call again with the same object `LEASE` seconds later. A process
    that is killed between making the file and naming itself in it leaves a file without an owner, as old.

    Raises:
        OSError: The folder cannot be written.
    """
    try:
        lease.acquire(blocking=False)
    except (Timeout, LeaseSettingsMismatch):  # LeaseSettingsMismatch: lease of another version with unknown duration
        file = Path(lease.lock_file)
        if lease.owner is not None or not _old(file):
            return False
        file.unlink(missing_ok=True)
        return acquire(lease)
    return True


def _old(file: Path) -> bool:
    """Return True if a file has not changed for `LEASE` seconds, or is gone."""
    try:
        return time.time() - file.stat().st_mtime > LEASE
    except OSError:
        return True


def owner_of(lease: SoftFileLease) -> str:
    """Return a description of the process that owns a lease, for messages."""
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"


def holder(file: Path) -> str:
    """Return a description of the live process that owns the lease on a file, or ""; nothing is written.

    The result depends on the file's age, so it is wrong if clocks differ by more than `LEASE`.
    """
    lease = lease_on(file)
    if (owner := lease.owner) is None or _old(file):
        return ""
    if owner.hostname.partition("?")[0] == socket.gethostname() and os.name == "posix":
        try:
            os.kill(owner.pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:  # process of another user
            pass
    return owner_of(lease)


_ENVIRONMENT = "RANDLORA_PL_RUN_FOLDER"
"""Environment variable by which the processes that Lightning starts for further devices get the run folder."""


def new_folder(root: Path, name: str, option: str = "--run.root") -> Path:
    """Make ``root/name/TIME``; a second run in the same second gets its own.

    Raises:
        UserError: The name has a slash, or the folder cannot be made; ``option`` sets another root.
    """

    def make() -> str:
        if re.search(r"[/\\]|^\.*$", name):
            raise UserError(f"run.name is {name!r}: give a plain name without slashes. Set the folder with --run.root.")
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        for number in range(1, 100):
            folder = root / name / (stamp if number == 1 else f"{stamp}_{number}")
            try:
                folder.mkdir(parents=True)
                return str(folder)
            except FileExistsError:
                continue
            except OSError as error:
                what = f"The run folder {folder} cannot be created ({error.strerror})."
                raise UserError(f"{what} See {option}.") from error
        raise UserError(f"{root / name} already has a hundred runs of this second. Give another --run.name.")

    return Path(decide_first("the run folder", _ENVIRONMENT, make))


def is_stamp(name: str) -> bool:
    """Return True if a folder has the time of a run as its name, as `new_folder` gives it."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", name) is not None


def output_folder(output: str | None, name: str) -> Path:
    """Return a new folder for results: the typed ``--output``, which `check_new` has read, or ``runs/name/TIME``.

    Raises:
        UserError: The folder cannot be made.
    """
    if output is None:
        return new_folder(Path("runs"), name, "--output")
    try:
        Path(output).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be created ({error.strerror}). Choose another --output.") from error
    return Path(output)


def check_new(output: str | None) -> str | None:
    """Return a folder that does not exist, or None.

    Raises:
        UserError: The folder exists.
    """
    if output is not None and Path(output).exists():
        raise UserError(f"{output} exists and is not overwritten. Choose a new folder.")
    return output


def missing_folders(folder: Path) -> list[Path]:
    """Return the missing ones of a folder and its parents, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_folder(folder: Path, made: Iterable[Path] = ()) -> None:
    """Remove a run folder without a checkpoint or an adapter, and empty parents ``made`` for it, innermost first."""
    if (folder / LAST).exists() or (folder / ADAPTER).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    unlink_latest(folder)
    os.environ.pop(_ENVIRONMENT, None)
    for parent in made:
        try:
            parent.rmdir()
        except OSError:
            return


def run_to_resume(root: Path, name: str, command: str) -> Path | None:
    """Return the newest run of a name that is unfinished, or finished by the same command, for ``--resume auto``.

    Args:
        root: Folder of all runs.
        name: Name of the run.
        command: Checksum of the command, see `Command.checksum`.
    """
    for folder in reversed(runs_in(root / name)):
        results = results_of(folder)
        if not results.get("finished") or results.get("command") == command:
            return folder
    return None


FILE = ".lock"
_LOOK = 0.2
"""Seconds between two reads of another process's lease."""


@contextmanager
def locked(folder: Path) -> Iterator[SoftFileLease]:
    """Hold the lock of a run folder; only on rank 0 of a job.

    Args:
        folder: The run folder; it exists.

    Yields:
        The lease, whose ``compromise`` is set once it is lost.

    Raises:
        UserError: Another process works in the folder, or the folder cannot be written.
    """
    lease = lease_on(folder / FILE)
    broadcast_decision("the lock of the run folder", lambda: "" if process_rank() else _take(lease, folder))
    try:
        yield lease
    finally:
        lease.release()


def _take(lease: SoftFileLease, folder: Path) -> str:
    """Acquire a lease as soon as its owner is dead."""
    first: tuple[int, int] | None = None
    for look in range(round(2 * LEASE / _LOOK)):
        try:
            if acquire(lease):
                return ""
        except OSError as error:
            what = f"{folder} cannot be written ({error.strerror}); make it writable to train in it."
            raise UserError(what) from None
        try:
            state = (folder / FILE).stat()
        except OSError:  # released, or taken over, meanwhile
            continue
        renewed = (state.st_ino, state.st_mtime_ns)
        first = first or renewed
        if renewed != first:
            raise UserError(
                f"{owner_of(lease)} is training in {folder}. Wait until it ends or stop it, then resume the run."
            )
        if look == round(2 * BEAT / _LOOK):
            wait = f"waiting up to {LEASE:.0f} s for its lock"
            print(f"{owner_of(lease)} shows no activity; {wait}", file=sys.stderr)
        time.sleep(_LOOK)
    raise UserError(f"{owner_of(lease)} holds {folder / FILE}. Delete that file if the process is dead.")


def find_lora(start: str) -> Path:
    """Return the LoRA that rank 0 finds: when the others look, the newest run of a name may be the new one itself.

    Raises:
        UserError: See `find_adapter`; also the errors of `decide_first`.
    """

    def find() -> str:
        lora = find_adapter(start)
        return str(lora.resolve() if lora.exists() else lora)  # a missing one is named as it was typed

    return Path(decide_first("--from-adapter", "RANDLORA_PL_FROM_ADAPTER", find))
