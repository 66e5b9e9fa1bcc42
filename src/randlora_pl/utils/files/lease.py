"""Leases on files: one process holds a run folder or a cell of a sweep, and another succeeds it when it is dead.

A lease works on network folders too, where locks of the operating system may hold on one machine only. A dead owner on
this machine is noticed at once. An owner elsewhere is dead when its file has not changed for `LEASE` seconds while
another process looked at it, which takes no common clock.
"""

import os
import socket
import time
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

LEASE = 60.0
"""Seconds without a renewal after which the owner counts as dead."""

BEAT = 2.0
"""Seconds between two renewals."""


def lease_on(file: Path) -> SoftFileLease:
    """Return the lease on a file, not yet acquired."""
    return SoftFileLease(file, lease_duration=LEASE, heartbeat_interval=BEAT)


def acquired(lease: SoftFileLease) -> bool:
    """Acquire a lease unless another process holds it.

    A lease of a dead owner elsewhere is acquired by a later call with the same object, `LEASE` seconds after the first.

    Raises:
        OSError: The folder cannot be written.
    """
    try:
        lease.acquire(blocking=False)
    except (Timeout, LeaseSettingsMismatch):  # the second: another version's, which has no end known here
        return False
    return True


def owner_of(lease: SoftFileLease) -> str:
    """Name the process that holds a lease, for messages."""
    owner = lease.owner
    return f"process {owner.pid} on {owner.hostname.partition('?')[0]}" if owner else "another process"


def holder(file: Path) -> str:
    """Name the live process that holds the lease on a file; empty if there is none. Nothing is written.

    The age of the file is used, so clocks that differ by more than `LEASE` give a wrong answer.
    """
    try:
        if time.time() - file.stat().st_mtime > LEASE:
            return ""
    except OSError:
        return ""
    lease = lease_on(file)
    if (owner := lease.owner) and owner.hostname.partition("?")[0] == socket.gethostname() and os.name == "posix":
        try:
            os.kill(owner.pid, 0)
        except ProcessLookupError:
            return ""
        except OSError:  # of another user
            pass
    return owner_of(lease)
