"""Decoded images in memory that all processes of a machine share: each is decoded once, not once by every worker."""

import logging
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.images.decode import Images

MOST_BYTES = 8 * 2**30
"""Most memory that the decoded images of a split may take on a machine; also at most a quarter of what is free."""

log = logging.getLogger("randlora_pl")

_HEAD = 8  # bytes before the table: where the next image goes
_ENTRY = 4  # int64 of each image in the table: where it begins (0: not decoded yet), height, width, channels


class CachedImages:
    """Keeps decoded images until a bound is reached; beyond it the rest is decoded at each call.

    They lie in a file without a name in the system's shared memory, which forked and spawned workers inherit, and
    which vanishes with the last process however that ends. Processes that are no relatives, as the ranks of a
    multi-device run are, come together at a ``path`` (see `meeting`).

    Args:
        images: What is kept.
        rows: int64 (n,), the numbers of the images that may be asked for; others are decoded at each call.
        limit: Most bytes of pixels; by default `MOST_BYTES` or a quarter of the free shared memory.
        path: A file to meet at; None: none.
    """

    def __init__(
        self,
        images: Images,
        rows: Sequence[int] | NDArray[np.int64],
        limit: int | None = None,
        path: Path | None = None,
    ) -> None:
        self.images = images
        self.rows = np.unique(np.asarray(rows, dtype=np.int64))
        self.limit = room(shared_folder()) if limit is None else limit
        self._open(_new_file() if path is None else _meeting_file(path))

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Image ``index``, from memory where any process has decoded it before; then ``short`` changes nothing."""
        slot = int(np.searchsorted(self.rows, index))
        if slot == len(self.rows) or self.rows[slot] != index:
            return self.images.load(index, short)
        kept = self._kept(slot)
        if kept is not None:
            return kept
        decoded = self.images.load(index, short)
        with self._locked():
            self._keep(slot, decoded)
        return decoded

    def name(self, index: int) -> str:
        """What the kept collection calls it."""
        return self.images.name(index)

    def kept(self) -> int:
        """How many images are in memory."""
        return int(np.count_nonzero(self._table[:, 0]))

    def _kept(self, slot: int) -> NDArray[np.uint8] | None:
        start, height, width, channels = self._table[slot].tolist()
        if not start:
            return None
        return self._bytes[start : start + height * width * channels].reshape(height, width, channels)

    def _keep(self, slot: int, pixels: NDArray[np.uint8]) -> None:
        start = int(self._next[0])
        if self._table[slot, 0] or start + pixels.nbytes > len(self._bytes):
            return
        if not _allocated(self._file, start, pixels.nbytes):
            self._next[0] = len(self._bytes)
            return
        self._bytes[start : start + pixels.nbytes] = pixels.reshape(-1)
        self._next[0] = start + pixels.nbytes
        self._table[slot, 1:] = pixels.shape
        self._table[slot, 0] = start  # last: from now on it is there

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time."""
        try:
            import fcntl
        except ImportError:  # Windows, where workers do not inherit the file (see `__reduce__`)
            yield
            return
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _open(self, file: IO[bytes]) -> None:
        """Maps the file, which is empty or has been mapped by a relative."""
        self._file = file
        first = _HEAD + 8 * _ENTRY * len(self.rows)
        with self._locked():
            size = os.fstat(file.fileno()).st_size
            if not size:  # the first to come says how large it may grow
                size = first + self.limit
                os.ftruncate(file.fileno(), size)  # sparse: takes memory only as it is written
                if not _allocated(file, 0, first):
                    size = 0
            mapped = (_mapped(file, size) if size else None) or bytearray(first)  # no room even for the table
            self._bytes = np.frombuffer(mapped, dtype=np.uint8)
            self._next = self._bytes[:_HEAD].view(np.int64)
            self._table = self._bytes[_HEAD:first].view(np.int64).reshape(-1, _ENTRY)
            self._next[0] = max(int(self._next[0]), first)

    def __reduce__(self) -> tuple[Any, ...]:
        """Hands the file to a process that is being spawned; any other copy begins an empty one."""
        spawning = get_spawning_popen() is not None and hasattr(reduction, "DupFd")
        handle = reduction.DupFd(self._file.fileno()) if spawning else None
        return _inherit, (self.images, self.rows, self.limit, handle)


def _mapped(file: IO[bytes], size: int) -> mmap.mmap | None:
    """The file as memory; None where this process may not have so much, as by ``ulimit -v``."""
    try:
        return mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):
        log.warning("decoded images are not kept: there is no address space for %s MB of them", f"{size >> 20:,}")
        return None


def _allocated(file: IO[bytes], start: int, count: int) -> bool:
    """Whether these bytes of a file have memory now: without, the first use in a full one would kill the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), start, count)
        except OSError:
            return False
    return True


def _inherit(images: Images, rows: NDArray[np.int64], limit: int, handle: Any) -> CachedImages:
    """The child's side of `CachedImages.__reduce__`."""
    if handle is None:
        return CachedImages(images, rows, limit)
    heir = CachedImages.__new__(CachedImages)
    heir.images, heir.rows, heir.limit = images, rows, limit
    heir._open(os.fdopen(handle.detach(), "r+b"))
    return heir


@contextmanager
def meeting(strategy: Any) -> Iterator[Path | None]:
    """A folder where the processes of a machine meet to share memory; it is gone afterwards, what is mapped stays.

    Args:
        strategy: Lightning's strategy, by which they agree on the folder; None: there is only one process.
    """
    if strategy is None:
        yield None
        return
    place: Path = strategy.broadcast(shared_folder() / f"randlora-pl-{secrets.token_hex(8)}")
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        yield place
        strategy.barrier("decoded images")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def shared_folder() -> Path:
    """Where shared memory is: the system's own, or the folder of temporary files where that has little room."""
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return memory if usable and (room(memory) == MOST_BYTES or room(memory) >= room(disk)) else disk


def room(folder: Path) -> int:
    """Bytes that decoded images may take there."""
    with suppress(OSError):
        return min(MOST_BYTES, shutil.disk_usage(folder).free // 4, _address_space() // 8)
    return 0


def _address_space() -> int:
    """Bytes that this process may map: batch systems limit them, and three splits are not all that it needs."""
    if find_spec("resource") is None:  # Windows
        return 8 * MOST_BYTES
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return 8 * MOST_BYTES if soft == resource.RLIM_INFINITY else soft


def _new_file() -> IO[bytes]:
    return tempfile.TemporaryFile(dir=shared_folder())


def _meeting_file(path: Path) -> IO[bytes]:
    """The file at ``path``, made by whoever comes first."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
