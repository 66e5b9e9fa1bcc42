"""One process a cell: lock files with owner, heartbeat and expiry, correct on shared network folders.

A lock is made by a hard link to a name that must not exist, which is atomic on NFS, too. A lock whose owner is dead is
never removed by others, which could hit the next owner's; it is succeeded: the successor links ``HASH.after-TOKEN``
with the token of the dead owner, which only one can do. The last in this chain holds the cell, and removes the chain
when it is done. Ages are measured by the clock of the file system, not by those of the machines.
"""

import contextlib
import errno
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from randlora_pl.utils.files.documents import parse_json

BEAT = 20.0
"""Seconds between two signs of life."""

EXPIRES = 300.0
"""Seconds without one after which an owner on another machine counts as dead; on this machine it is asked for."""


@dataclass
class Lock:
    """A held lock; it shows signs of life until it is released.

    Attributes:
        path: The lock of the cell.
        file: The end of the chain, which this process has made.
        token: Names this holder.
    """

    path: Path
    file: Path
    token: str
    _stop: threading.Event = field(default_factory=threading.Event)

    def start(self) -> "Lock":
        """Begins with the signs of life."""
        threading.Thread(target=self._beat, name="sweep-lock", daemon=True).start()
        return self

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def release(self) -> None:
        """Gives the cell up, unless another process has succeeded this one, which it took for dead."""
        self._stop.set()
        chain = _chain(self.path)
        if not chain or chain[-1][1].get("token") != self.token:
            return
        for file, _ in chain:  # the first makes the cell free; the others mean nothing without it
            file.unlink(missing_ok=True)


def acquire(path: Path) -> Lock | None:
    """Takes a lock, also that of a dead owner.

    Args:
        path: The lock file; its folder is made.

    Returns:
        The lock, or None where somebody else has it.

    Raises:
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    chain = _chain(path)
    if not chain:
        return _take(path, path)
    if alive(*chain[-1]):
        return None
    dead = str(chain[-1][1].get("token", ""))
    lock = _take(path, path.with_name(f"{path.stem}.after-{dead}"))
    if lock is None:
        return None
    after = _chain(path)
    if not after or after[-1][1].get("token") != lock.token:  # the chain was removed meanwhile
        lock.file.unlink(missing_ok=True)
        lock._stop.set()
        return None
    return lock


def holder(path: Path) -> dict[str, Any] | None:
    """Who works on a cell: ``host`` and ``pid``; None where nobody does or the owner is dead."""
    chain = _chain(path)
    return chain[-1][1] if chain and alive(*chain[-1]) else None


def alive(file: Path, owner: dict[str, Any]) -> bool:
    """Whether the owner of a lock still works.

    Args:
        file: Its file.
        owner: Its content.
    """
    pid = owner.get("pid")
    if owner.get("machine") == _machine() and isinstance(pid, int) and pid:
        return _started(pid) == owner.get("started")
    try:
        return _clock(file.parent) - file.stat().st_mtime < EXPIRES
    except OSError:  # released meanwhile
        return True


def _take(path: Path, file: Path) -> Lock | None:
    token = secrets.token_hex(8)
    pid = os.getpid()
    owner = {"token": token, "host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid)}
    part = file.with_name(f".{path.stem}.{token}")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(owner) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        mine = _linked(part, file)
    finally:
        part.unlink(missing_ok=True)
    return Lock(path, file, token).start() if mine else None


def _linked(part: Path, file: Path) -> bool:
    """Gives a whole file its name, unless that is taken."""
    try:
        os.link(part, file)
    except FileExistsError:
        return False
    except OSError as error:
        if part.stat().st_nlink == 2:  # NFS has done it and lost its answer
            return True
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # a file system without links
            raise
        try:
            with file.open("x", encoding="utf-8") as stream:
                stream.write(part.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The lock and its successors; the last holds the cell."""
    found: list[tuple[Path, dict[str, Any]]] = []
    file = path
    while True:
        try:
            owner = parse_json(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return found
        except ValueError:  # not one of ours, or damaged; it expires by its age
            owner = {}
        owner = owner if isinstance(owner, dict) else {}
        found.append((file, owner))
        file = path.with_name(f"{path.stem}.after-{owner.get('token', '')}")
        if file == found[-1][0]:  # two damaged files
            return found


def _clock(folder: Path) -> float:
    """The time by the clock of the file system; by this machine's where a folder may only be read."""
    probe = folder / f".clock.{secrets.token_hex(8)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _machine() -> str:
    """This machine, this boot, this space of process numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _started(pid: int) -> str:
    """When a process was started, empty where there is none; a later process with its number has another time."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "running"
