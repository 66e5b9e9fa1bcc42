"""Cache of decoded images in memory that all processes of a machine share, so that each image is decoded once."""

import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.sources import Images
from randlora_pl.utils.text import byte_size

log = logging.getLogger("randlora_pl")

MOST_BYTES = 8 * 2**30
"""Maximum memory of a split's decoded images per machine; also limited to a quarter of the free memory."""

_HEAD = 8  # bytes before the table: offset of the next image
_ENTRY = 4  # int64 values per image in the table: offset (0: not decoded yet), height, width, channels


class CachedImages:
    """Cache of decoded images up to a size limit; further images are decoded on each access.

    Pixels are in an unnamed file in the system's shared memory, which forked and spawned workers inherit, and which
    disappears with the last process. Unrelated processes, such as the ranks of a multi-device run, open the same
    ``path`` (see `meeting`).

    Args:
        images: Image collection to cache.
        rows: int64 (n,), indices of the images to cache; others are decoded on each access.
        limit: Maximum bytes of pixels; default: `MOST_BYTES` or a quarter of the free shared memory.
        path: Shared file, or a handle of it (see `__reduce__`); None for an unnamed one.
    """

    def __init__(
        self,
        images: Images,
        rows: Sequence[int] | NDArray[np.int64],
        limit: int | None = None,
        path: Any = None,
    ) -> None:
        self.images = images
        self.rows = np.unique(np.asarray(rows, dtype=np.int64))
        self.limit = room(shared_folder()) if limit is None else limit
        if path is None:
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=shared_folder())  # noqa: SIM115
        else:
            number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600) if isinstance(path, Path) else path.detach()
            self._file = os.fdopen(number, "r+b")
        first = _HEAD + 8 * _ENTRY * len(self.rows)
        with self._locked():
            size = os.fstat(self._file.fileno()).st_size or first + self.limit  # the first process sets it
            self._bytes = np.zeros(first, dtype=np.uint8)  # for the table alone, where the file cannot be mapped
            if _allocated(self._file, 0, first):
                try:
                    self._bytes = np.asarray(np.memmap(self._file, np.uint8, "r+", shape=(size,)))
                except (OSError, ValueError):  # memory, or the process's limit (``ulimit -v``), is too small
                    log.warning("decoded images are not cached: not enough address space for %s", byte_size(size))
            self._next = self._bytes[:_HEAD].view(np.int64)
            self._table = self._bytes[_HEAD:first].view(np.int64).reshape(-1, _ENTRY)
            self._next[0] = max(int(self._next[0]), first)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Return image ``index`` from memory if any process has decoded it; ``short`` is then ignored."""
        slot = int(np.searchsorted(self.rows, index))
        if slot == len(self.rows) or self.rows[slot] != index:
            return self.images.load(index, short)
        start, *shape = self._table[slot].tolist()
        if start:
            return self._bytes[start : start + math.prod(shape)].reshape(shape)
        decoded = self.images.load(index, short)
        with self._locked():
            start = int(self._next[0])
            if self._table[slot, 0] or start + decoded.nbytes > len(self._bytes):
                return decoded
            if not _allocated(self._file, start, decoded.nbytes):
                self._next[0] = len(self._bytes)
                return decoded
            self._bytes[start : start + decoded.nbytes] = decoded.reshape(-1)
            self._next[0] = start + decoded.nbytes
            self._table[slot, 1:] = decoded.shape
            self._table[slot, 0] = start  # last: this marks the entry as valid
        return decoded

    def name(self, index: int) -> str:
        """Return the name in the cached collection."""
        return self.images.name(index)

    @contextmanager
    def _locked(self) -> Iterator[None]:
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

    def __reduce__(self) -> tuple[Any, ...]:
        """Pass the file to a spawned process; any other copy starts with an empty cache."""
        spawning = get_spawning_popen() is not None and hasattr(reduction, "DupFd")
        handle = reduction.DupFd(self._file.fileno()) if spawning else None
        return CachedImages, (self.images, self.rows, self.limit, handle)


def _allocated(file: IO[bytes], start: int, count: int) -> bool:
    """Allocate bytes of a file and return True on success; unallocated, a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), start, count)
        except OSError:
            return False
    return True


@contextmanager
def meeting(strategy: Any) -> Iterator[Path | None]:
    """Create a temporary folder in which the processes of a machine share memory; mapped files outlive it.

    All processes must wait for each other at the end of the block.

    Args:
        strategy: Lightning's strategy, which broadcasts the folder's name; None for a single process.
    """
    if strategy is None:
        yield None
        return
    meeting_folder: Path = strategy.broadcast(shared_folder() / f"randlora-pl-{secrets.token_hex(8)}")
    try:
        meeting_folder.mkdir(mode=0o700, exist_ok=True)
        yield meeting_folder
    finally:
        shutil.rmtree(meeting_folder, ignore_errors=True)


def shared_folder() -> Path:
    """Return the folder of shared memory, or of temporary files if shared memory is small."""
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return memory if usable and (room(memory) == MOST_BYTES or room(memory) >= room(disk)) else disk


def room(folder: Path) -> int:
    """Return the bytes available for decoded images in a folder."""
    most = MOST_BYTES
    with suppress(ImportError):  # Windows
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)  # batch systems set it, and three splits are only a part
        most = most if soft == resource.RLIM_INFINITY else min(most, soft // 8)
    with suppress(OSError):
        return min(most, shutil.disk_usage(folder).free // 4)
    return 0
