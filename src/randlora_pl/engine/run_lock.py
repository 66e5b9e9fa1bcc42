"""One process per run folder: a lease on a file in it, which is renewed while the process lives.

A lease works on network folders too, where locks of the operating system may hold on one machine only. A dead owner on
this machine is seen at once; any other is dead once its lease has not been renewed for `LEASE` seconds.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from randlora_pl.parallel.launch import broadcast_decision, process_rank
from randlora_pl.utils.errors import UserError

FILE = ".lock"
LEASE = 60.0
"""Seconds without a renewal after which the owner counts as dead."""

BEAT = 2.0
"""Seconds between two renewals."""

_LOOK = 0.2
"""Seconds between two looks at somebody else's lease."""


@contextmanager
def locked(folder: Path) -> Iterator[SoftFileLease]:
    """Hold the lock of a run folder; of a job's processes only the first one does.

    Args:
        folder: The run folder; it exists.

    Yields:
        The lease, whose ``compromise`` is set once it is lost.

    Raises:
        UserError: Another process works in the folder, or the folder cannot be written.
    """
    lease = SoftFileLease(folder / FILE, lease_duration=LEASE, heartbeat_interval=BEAT)
    broadcast_decision("lock", lambda: "" if process_rank() else _take(lease, folder))
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
    for look in range(round(2 * LEASE / _LOOK)):
        try:
            lease.acquire(blocking=False)
            return ""
        except (Timeout, LeaseSettingsMismatch):  # the second: another version's, which has no end known here
            pass
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
                f"{_owner(lease)} is training in {folder}. Wait for its end, or stop it, then resume the run."
            )
        if look == round(2 * BEAT / _LOOK):
            print(f"{_owner(lease)} gives no sign of life; waiting up to {LEASE:.0f} s for its lock", file=sys.stderr)
        time.sleep(_LOOK)
    raise UserError(f"{_owner(lease)} holds {folder / FILE}. Delete that file if the process is dead.")


def _owner(lease: SoftFileLease) -> str:
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"
