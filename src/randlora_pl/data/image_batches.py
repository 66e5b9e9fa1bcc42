"""Numbered batches of images for training and evaluation, and a cache of decoded images that processes share."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from randlora_pl.data.loader import Batch, EvalSchedule, TrainSchedule
from randlora_pl.data.readers import Samples
from randlora_pl.data.sources import Images, Ints, Pixels
from randlora_pl.data.transforms import PLAIN, Augment, eval_pixels, finish, pixels_needed, train_pixels
from randlora_pl.utils.errors import UnreadableImageError, log
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.machine import usable_cores
from randlora_pl.utils.text import byte_size

MOST_BYTES = 8 * 2**30
"""Maximum memory of a split's decoded images per machine; also limited to a quarter of the free memory."""

_HEAD = 8  # bytes before the table: offset of the next image
_ENTRY = 4  # int64 values per image in the table: offset (0: not decoded yet), height, width, channels

Late = Literal["nothing", "colors", "crops"]
"""Steps left to `transforms.finish`: none, flips and normalization, or (training, one size only) crops as well."""


def load_images(
    samples: Samples, indices: Tensor, frame: ImageSpec, scale: tuple[float, float] | None, skip: bool
) -> tuple[list[Tensor], dict[int, tuple[str, str]]]:
    """Load the images of some samples.

    Args:
        samples: Samples of a split.
        indices: int64 (b,), indices in the split.
        frame: Image preprocessing.
        scale: Minimum and maximum area fraction of a training crop; None in evaluation.
        skip: Skip unreadable images.

    Returns:
        b images, uint8 (height, width, channels), the mean color for unreadable ones; and (name, error) of these by
        index in the batch.

    Raises:
        UserError: An image is unreadable and ``skip`` is false, or the machine or the storage fails.
    """
    images: list[Tensor] = []
    bad: dict[int, tuple[str, str]] = {}
    short = pixels_needed(frame, scale)
    for number, row in enumerate(samples.rows[indices.numpy()].tolist()):
        try:
            images.append(torch.from_numpy(samples.images.load(row, short)))
        except UnreadableImageError as error:  # not of a lost shard, or of memory that ran out
            if not skip:
                raise
            bad[number] = (samples.images.name(row), str(error))
            colour = torch.tensor(frame.mean).mul(255).round().to(torch.uint8)
            images.append(colour.expand(frame.size, frame.size, 3))
    return images, bad


def _without(batch: Batch, bad: dict[int, tuple[str, str]]) -> Batch:
    """Set the weight of unreadable images to 0; `Loader` counts them."""
    if bad:
        batch["weight"][list(bad)] = 0.0
        batch["bad"] = list(bad.values())
    return batch


def counted_classes(labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes of a single micro-batch, and their counts.

    A class of padding alone has count 0 and adds nothing to any loss. If all is padding, all of it counts: the
    losses have weight 0 then, but every parameter must get a gradient.

    Args:
        labels: int64 (b,), classes of the images.
        counted: bool (b,), True for samples that are not padding.

    Returns:
        Sorted classes (u,) and their counts (u,), int64.
    """
    classes, indices = torch.unique(labels, return_inverse=True)
    counts = torch.nn.functional.one_hot(indices, len(classes))[counted | ~counted.any()].sum(0)
    return classes, counts


def targets_of(samples: Samples, indices: Tensor) -> Batch:
    """Return the entry ``target``, float32 (b, classes) of 0 and 1, of samples that may have several classes."""
    if samples.sets is None:
        return {}
    return {"target": torch.from_numpy(samples.sets[indices.numpy()].toarray().astype(np.float32))}


@dataclass(frozen=True)
class TrainBatches:
    """Training batches of one rank: one dictionary per micro-batch.

    ``image`` (b, 3, H, W) float32, ``label`` (b,) int64, ``weight`` (b,) float32, ``position`` (b,) int64, ``index``
    (b,) int64 index in the split, ``step_classes`` and ``step_counts`` (u,) int64: sorted labels of the whole
    optimizer step and their counts, ``own_classes`` and ``own_counts``: the same for the micro-batch alone (see
    `counted_classes`), ``micro_batch`` and ``micro_batches``: index and number of its micro-batches.
    The mean loss of an optimizer step is the sum of weight x loss (see `MicroBatch`); weights include
    ``class_weights``. A skipped unreadable image has weight 0; other weights do not change. Steps left (see `Late`)
    are in further entries. If images are blended or may have several classes, ``target`` (b, classes) float32 has
    their labels.
    """

    samples: Samples
    schedule: TrainSchedule
    frame: ImageSpec
    scale: tuple[float, float]
    flip: bool
    skip: bool = False
    late: Late = "nothing"
    class_weights: Tensor | None = None
    augment: Augment = PLAIN
    classes: int = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        micro_batch = self.schedule[number]
        plan = self.schedule.plan
        indices = plan.samples(micro_batch.positions)
        labels = torch.from_numpy(self.samples.labels)
        images, bad = load_images(self.samples, indices, self.frame, self.scale, self.skip)
        classes, counts = torch.unique(labels[plan.samples(micro_batch.step_positions)], return_counts=True)
        late, change = self.late == "crops", None
        if self.augment.randaugment is not None:
            change = lambda index, crop: self.augment.changed(crop, int(micro_batch.positions[index]), plan.seed)  # noqa: E731
        batch = {
            **train_pixels(images, micro_batch.positions, plan.seed, self.frame, self.scale, self.flip, late, change),
            "label": labels[indices],
            **targets_of(self.samples, indices),
            **micro_batch.entries(indices, labels[indices], self.class_weights),
            "step_classes": classes,
            "step_counts": counts,
        }
        batch = _without(batch, bad)
        batch["own_classes"], batch["own_counts"] = counted_classes(batch["label"], batch["weight"] > 0)
        batch |= self.augment.mixing(micro_batch.positions, batch["weight"], plan.seed, self.classes)
        return batch if self.late != "nothing" else finish(batch, self.frame)


@dataclass(frozen=True)
class EvalBatches:
    """Evaluation batches of one rank: ``image``, ``label``, ``weight`` (0 for padding and skipped), ``index``.

    Images that may have several classes have them in ``target`` (b, classes). A further entry, ``whole``, is True if no
    weight is 0, so that a GPU need not be asked.
    """

    samples: Samples
    schedule: EvalSchedule
    frame: ImageSpec
    skip: bool = False
    late: Late = "nothing"

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        indices, weights = self.schedule[number]
        images, bad = load_images(self.samples, indices, self.frame, None, self.skip)
        batch = {
            "image": eval_pixels(images, self.frame),
            "label": torch.from_numpy(self.samples.labels)[indices],
            **targets_of(self.samples, indices),
            "weight": weights,
            "index": indices,
        }
        batch = _without(batch if self.late != "nothing" else finish(batch, self.frame), bad)
        return {**batch, "whole": bool((batch["weight"] > 0).all())}


def default_workers(in_memory: bool, frame: ImageSpec, devices: int) -> int:
    """Return the worker processes per device: 0 if images in memory make cheap batches, else its part of the cores."""
    if in_memory and (frame.size <= 64 or not torch.cuda.is_available()):
        return 0
    if torch.cuda.is_available():  # a core decodes 150 to 300 photographs a second, a GPU trains on thousands
        workers = (usable_cores() - 1) // max(1, devices)
        return min(32, max(1, workers))  # each holds two batches in shared memory
    return min(8, usable_cores() // max(1, devices))


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

    def __init__(self, images: Images, rows: Sequence[int] | Ints, limit: int | None = None, path: Any = None) -> None:
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

    def load(self, index: int, short: int = 0) -> Pixels:
        """Return image ``index`` from memory if any process has decoded it; ``short`` is then ignored."""
        slot = int(np.searchsorted(self.rows, index))
        if slot == len(self.rows) or self.rows[slot] != index:
            return self.images.load(index, short)
        start, height, width, channels = self._table[slot].tolist()
        if start:
            return self._bytes[start : start + height * width * channels].reshape(height, width, channels)
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
