"""One process per run folder: a lease on a file in it, which is renewed while the process lives."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import SoftFileLease

from randlora_pl.run.parallel.launch import broadcast_decision, process_rank
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import lease as leases
from randlora_pl.utils.files.lease import acquired, lease_on, owner_of

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
    """Acquire a lease as soon as its owner is dead.

    Raises:
        UserError: The owner renews it, or another process was faster.
    """
    first: tuple[int, int] | None = None
    for look in range(round(2 * leases.LEASE / _LOOK)):
        try:
            if acquired(lease):
                return ""
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}); make it writable to train in it."
            ) from None
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
        if look == round(2 * leases.BEAT / _LOOK):
            print(
                f"{owner_of(lease)} shows no activity; waiting up to {leases.LEASE:.0f} s for its lock",
                file=sys.stderr,
            )
        time.sleep(_LOOK)
    raise UserError(f"{owner_of(lease)} holds {folder / FILE}. Delete that file if the process is dead.")
