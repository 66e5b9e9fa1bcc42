"""Leases on files: one process owns a run folder or a cell of a sweep, and another takes over if the owner is dead.

A lease also works on network folders, where locks of the operating system may apply to one machine only. A dead owner
on this machine is detected at once. An owner on another machine is dead if its file does not change for `LEASE`
seconds while another process observes it, which needs no common clock.
"""

import os
import socket
import time
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

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
