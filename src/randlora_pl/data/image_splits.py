"""Splits of image datasets: read once, with the training subset, and cached in memory if small.

All processes of a machine share this memory, so that each image is decoded once.
"""

import logging
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data import splits
from randlora_pl.data.catalog.registry import MOST_VALIDATION_SHOTS
from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers.dispatch import Samples, read
from randlora_pl.data.sources import WHITE, ArrayImages, Color, EncodedImages, Images
from randlora_pl.data.splits import labels_of, of_half, read_draw, shots_of
from randlora_pl.data.validate import is_draw
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.reuse import cached
from randlora_pl.utils.text.formatting import byte_size

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
        self._file = _opened(path)
        first = _HEAD + 8 * _ENTRY * len(self.rows)
        with self._locked():
            size = os.fstat(self._file.fileno()).st_size or first + self.limit  # the first process sets it
            self._bytes = _mapped(self._file, size, first)
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
            self._keep(slot, decoded)
        return decoded

    def name(self, index: int) -> str:
        """Return the name in the cached collection."""
        return self.images.name(index)

    def kept(self) -> int:
        """Return the number of cached images."""
        return int(np.count_nonzero(self._table[:, 0]))

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
        self._table[slot, 0] = start  # last: this marks the entry as valid

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


def _opened(path: Any) -> IO[bytes]:
    if path is None:
        return tempfile.TemporaryFile(dir=shared_folder())
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600) if isinstance(path, Path) else path.detach()
    return os.fdopen(number, "r+b")


def _mapped(file: IO[bytes], size: int, first: int) -> NDArray[np.uint8]:
    """Map a sparse file; if memory or the process's limit (``ulimit -v``) is too small, return a table of its own."""
    if _allocated(file, 0, first):
        try:
            return np.asarray(np.memmap(file, np.uint8, "r+", shape=(size,)))
        except (OSError, ValueError):
            log.warning("decoded images are not cached: not enough address space for %s", byte_size(size))
    return np.zeros(first, dtype=np.uint8)


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


log = logging.getLogger("randlora_pl")

SMALL_SET = 5_000
"""Maximum number of files of a split cached decoded by default."""


@dataclass
class ImageSplits:
    """Samples of a dataset by split; the fields without defaults are arguments of `ImageData`.

    Attributes:
        half: Argument ``classes``: which half of the classes, or ``all``.
        shots: Images per class; also of a published draw, once it was read.
        found: Complete splits with all classes, after `read`.
        held: Requested samples by split.
        classnames: Class name of each label, for the file of chosen images.
        first: True on rank 0, which writes this file.
        meeting_place: Folder of the memory shared by the processes of a machine.
        background: Color behind transparent pixels; set before samples are asked for.
    """

    row: DatasetSpec
    root: Path
    shots: int | None
    fraction: float | None
    train_split: str
    seed: int
    shots_file: str | None
    split: str
    half: str
    cache_images: bool | None
    max_pixels: int
    found: splits.Splits | None = None
    held: dict[str, Samples] = field(default_factory=dict)
    classnames: list[str] = field(default_factory=list)
    first: bool = True
    meeting_place: Path | None = None
    background: Color = WHITE

    def read(self) -> splits.Splits:
        """Return the complete splits; a process reads them once."""
        row, root = self.row, self.root  # the closure must not keep this object
        key = (row.name, self.split, root)
        self.found = cached("splits", key, lambda: splits.Splits(lambda split: read(row, root, split)))
        return self.found

    @contextmanager
    def together(self, strategy: Any) -> Iterator[None]:
        """Read splits with the other processes of a machine, which share decoded images (see `meeting`)."""
        with meeting(strategy) as self.meeting_place:
            yield
        self.meeting_place = None

    @property
    def trains_on_val(self) -> bool:
        """True if validation images are trained on."""
        return self.train_split == "full" and self.found is not None and not self.found.own_val

    def samples(self, split: str) -> Samples:
        """Return the samples of ``train`` (the chosen subset), ``val`` or ``test``.

        Raises:
            UserError: `read` was not called.
        """
        if self.found is None:
            raise UserError("Call setup() before asking for samples")
        if split not in self.held:
            whole = getattr(self.found, split)
            samples = self._subset(self.found) if split == "train" else of_half(whole, self.half)
            if split == "val" and self.split == "coop" and self.few:
                self.samples("train")  # a published draw sets the shots
                assert self.shots is not None
                few = min(self.shots, MOST_VALIDATION_SHOTS)
                samples = samples.subset(splits.few_shot(samples.labels, samples.numbers, few, self.seed))
            if split == "val" and self._draws_from_val:
                drawn = set(self.samples("train").keys)
                samples = samples.subset(np.flatnonzero([key not in drawn for key in samples.keys]))
            expected = self.row.counts.get(split)
            if expected not in (None, len(whole)):
                option = f" --split {self.split}" if self.split != "default" else ""
                log.warning(
                    "%s has %s %s images here, expected %s. For details, run: randlora-pl data check %s --root %s%s",
                    self.row.name, f"{len(whole):,}", split, f"{expected:,}", self.row.name, self.root, option,
                )  # fmt: skip
            if isinstance(samples.images, EncodedImages):
                images = replace(samples.images, most_pixels=self.max_pixels, background=self.background)
                samples = replace(samples, images=images)
            self.held[split] = self._cached(samples, few=split == "train" and self.few)
        return self.held[split]

    def write_index(self, folder: Path) -> Path | None:
        """Write the chosen training images as ``shots.json`` into a folder; return None if all are used."""
        if not self.few and self.fraction is None:
            return None
        path = Path(folder) / "shots.json"
        splits.write_index(path, self._key, self.samples("train"), self.classnames)
        return path

    def reuse_index(self, folder: Path) -> None:
        """Reuse the training images of an interrupted run if it chose them with the same options."""
        path = Path(folder) / "shots.json"
        if self.shots_file is None and path.is_file() and splits.has_key(path, self._key):
            self.shots_file = str(path)

    def check_not_empty(self, split: str) -> None:
        """Refuse a split without images.

        Raises:
            UserError: The split is empty.
        """
        if not len(self.samples(split)):
            raise UserError(
                f"{self.row.title}: no {split} images found; {len(self.samples('train'))} training images are too "
                f"few to hold some out. Add images{', or a folder ' + split if self.row.name == 'folder' else ''}"
            )

    def names(self, classnames: list[str]) -> list[str]:
        """Return the class names of this half, and keep them for the file of chosen images.

        Raises:
            UserError: The half has fewer than two.
        """
        kept = labels_of(len(classnames), self.half)
        if self.half != "all" and len(kept) < 2:
            raise UserError(
                f"--data.classes {self.half} is {len(kept)} of {len(classnames)} classes; a classifier needs two. "
                "Leave it out, or add classes"
            )
        self.classnames = classnames[kept.start : kept.stop]
        return self.classnames

    @property
    def few(self) -> bool:
        """True for few-shot training, also by a published draw."""
        return self.shots is not None or is_draw(self.shots_file)

    @property
    def _draws_from_val(self) -> bool:
        """True if a published draw may have images that are held out here for validation."""
        return is_draw(self.shots_file) and self.found is not None and not self.found.own_val

    @property
    def _key(self) -> dict[str, Any]:
        key = splits.index_key(self.row.name, self.shots, self.fraction, self.train_split, self.seed)
        key |= {"split": self.split} if self.split != "default" else {}
        return key | ({"classes": self.half} if self.half != "all" else {})

    def _subset(self, found: splits.Splits) -> Samples:
        samples = found.full if self.train_split == "full" else found.train
        path = None if self.shots_file is None else Path(self.shots_file).expanduser()
        if path is not None and is_draw(path):
            drawn = of_half(read_draw(path, found.full if self._draws_from_val else samples), self.half)
            self.shots = shots_of(path, drawn, self.shots)
            return drawn
        samples = of_half(samples, self.half)
        if path is not None and path.exists():
            return splits.read_index(path, self._key, samples)
        chosen = splits.subset(samples, self.shots, self.fraction, self.seed, self.classnames)
        if path is not None and self.first:
            splits.write_index(path, self._key, chosen, self.classnames)
        return chosen

    def _cached(self, samples: Samples, few: bool) -> Samples:
        small = few or len(samples) <= SMALL_SET
        if isinstance(samples.images, ArrayImages) or not (small if self.cache_images is None else self.cache_images):
            return samples
        path = None if self.meeting_place is None else self.meeting_place / str(len(self.held))
        return replace(samples, images=CachedImages(samples.images, samples.rows, path=path))
