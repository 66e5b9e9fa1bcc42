"""Datasets on disk: their installation and verification.

Installation: download, verify, unpack to a temporary folder, move to the root. Archives are in
``ROOT/downloads/NAME`` until the dataset has been read; the user may put them there as well. Verification compares
counts and classes, and decodes images.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from randlora_pl.data.catalog import SPLITS, Archive, DatasetSpec, dataset_path, get_command, how_to_get, present
from randlora_pl.data.download import ProgressCallback, download, fetched, forget, host, mismatch, unpack
from randlora_pl.data.loader import remarks
from randlora_pl.data.readers import Samples, read
from randlora_pl.data.readers.trees import ignore_stored
from randlora_pl.data.sources import EncodedImages
from randlora_pl.data.splits import Splits, evenly
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors
from randlora_pl.utils.text import byte_size

EVERY = 30.0
"""Seconds between two progress lines of one file."""

MOST = 5
"""Maximum number of unreadable images named per split."""

Tick = Callable[[int], None]
_CHUNK = 1_024


class DownloadProgress:
    """Progress of `get` as printed lines."""

    def report(self, text: str) -> None:
        """Print one line about a finished or started step."""
        print(f"  {text}", flush=True)

    def progress(self, text: str) -> AbstractContextManager[ProgressCallback]:
        """Return a context with a progress callback for the step in ``text``."""
        last = time.monotonic()

        def tick(done: int, total: int | None) -> None:
            nonlocal last
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                self.report(f"{text}, {byte_size(done)}" + ("" if total is None else f" of {byte_size(total)}"))

        return nullcontext(tick)


def get(row: DatasetSpec, root: Path, watch: DownloadProgress) -> None:
    """Download, verify and unpack the files of a dataset to the folder of datasets, even if it exists.

    Raises:
        UserError: A file is not available or wrong. Nothing is installed.
    """
    if by_hand(row, root):
        raise UserError(
            f"{row.name} is not in {root} and cannot be downloaded automatically. "
            f"For the steps, run: {get_command(row, root)}"
        )
    home = downloads(row, root)
    with _alone(home, row):
        aside = home / "unpacked"
        try:
            for file in row.files:
                _obtain(row, root, file, watch)
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed command
            for file in row.files:
                _unpack(home / file.name, file, aside, watch)
            _move(aside, root)
            watch.report(f"installed: {dataset_path(row, root)}")
        except OSError as error:
            raise UserError(f"{row.name} cannot be installed in {root}: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def tidy(row: DatasetSpec, root: Path) -> None:
    """Remove downloaded archives; keep the user's own and those in use by another command."""
    home = downloads(row, root)
    done = [home / file.name for file in row.files if fetched(home / file.name)]
    if done:
        with suppress(UserError), _alone(home, row):
            for path in done:
                forget(path)
    for folder in (home, home.parent):
        with suppress(OSError):  # not empty
            folder.rmdir()


def by_hand(row: DatasetSpec, root: Path) -> list[str]:
    """Return the remaining manual steps before `get` can run, one line each."""
    if not row.files:
        return [line.format(root=root) for line in row.by_hand]
    home = downloads(row, root)
    return [
        f"put {file.name} into {home}: {file.page}"
        for file in row.files
        if not file.urls and not (home / file.name).exists()
    ]


def downloads(row: DatasetSpec, root: Path) -> Path:
    """Return the folder of a dataset's archives."""
    return root / "downloads" / row.name


@contextmanager
def _alone(home: Path, row: DatasetSpec) -> Iterator[None]:
    """Lock the folder against a second command; the system releases the lock of a killed one."""
    lock = FileLock(home / ".lock")
    with disk_errors(home, ""):
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"Another command is downloading {row.name} to {home}. Wait until it ends") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _obtain(row: DatasetSpec, root: Path, file: Archive, watch: DownloadProgress) -> None:
    path = downloads(row, root) / file.name
    verdict = f"its {file.checksum.partition(':')[0]} is correct" if file.checksum else "no checksum is published"
    if path.exists():
        with watch.progress(f"{file.name}: verifying") as tick:
            wrong = mismatch(path, file.checksum, tick)
        if not wrong:
            watch.report(f"{file.name}: already downloaded, {verdict}")
            return
        if not fetched(path):  # the user's own file is not deleted
            raise UserError(f"{path} is not the published file: {wrong}", f"Remove it, then: {get_command(row, root)}")
        forget(path)
    with watch.progress(f"{file.name}: downloading") as tick:
        try:
            source = download(file.urls, path, file.checksum, tick)
        except UserError as error:
            absent = [other for other in row.files if not (path.parent / other.name).exists()]
            named = ", ".join(f"{other.name} ({other.page or other.urls[0]})" for other in absent)
            raise UserError(
                f"{row.name}: {file.name} could not be downloaded: {error}",
                f"By hand: put into {path.parent}: {named}; then: {get_command(row, root)}",
            ) from error
    watch.report(f"{file.name}: {byte_size(path.stat().st_size)} from {host(source)}, {verdict}")


def _unpack(path: Path, file: Archive, aside: Path, watch: DownloadProgress) -> None:
    """Unpack one file into its folder below ``aside``; copy it if it is not an archive."""
    folder = aside / file.into
    folder.mkdir(parents=True, exist_ok=True)
    if not file.name.lower().endswith((".zip", ".gz", ".tar", ".tgz", ".tar.bz2", ".tar.xz")):
        shutil.copyfile(path, folder / file.name)
        return
    if file.inner:
        outer = aside.with_name("outer")
        try:
            shutil.rmtree(outer, ignore_errors=True)
            unpack(path, outer)
            held = outer / file.inner
            if not held.is_file():
                raise UserError(f"{path} does not contain {file.inner}")
            _unpack(held, Archive(held.name, into=file.into, leave=file.leave), aside, watch)
        finally:
            shutil.rmtree(outer, ignore_errors=True)
        return
    with watch.progress(f"{file.name}: unpacking") as tick:
        count = unpack(path, folder, file.leave, tick)
    watch.report(f"{file.name}: unpacked, {count:,} {'file' if count == 1 else 'files'}")


def _move(source: Path, target: Path) -> None:
    """Move a folder's contents into another folder; a missing folder is moved completely."""
    for entry in sorted(source.iterdir()):
        there = target / entry.name
        if entry.is_dir() and there.is_dir():
            _move(entry, there)
        elif there.exists() and (entry.is_dir() or there.is_dir()):
            raise UserError(f"cannot write {there}: a {'folder' if there.is_dir() else 'file'} with this name exists")
        else:
            shutil.move(entry, there)  # shutil: the target may be on another disk


@dataclass(frozen=True)
class SplitReport:
    """Result for one split: images found, expected (None if unknown), and decoded without errors.

    ``fewest`` and ``most`` are (class, images) of the smallest and the largest class; None for captions.
    ``transparent`` of the decoded images depend on the color behind them.
    """

    split: str
    images: int
    expected: int | None
    fewest: tuple[str, int] | None
    most: tuple[str, int] | None
    decoded: int
    transparent: int = 0


@dataclass
class Report:
    """Result for one dataset: readable splits, and problems of one or two lines each."""

    name: str
    splits: list[SplitReport] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)
    missing: bool = False


def check(row: DatasetSpec, root: Path, sample: int | None, tick: Tick = lambda _: None) -> Report:
    """Read a dataset and compare it with its specification.

    Args:
        row: Specification of the dataset.
        root: Folder (or file) of the dataset.
        sample: Number of images to decode per split, evenly spaced; None for all.
        tick: Receives the number of images just decoded.
    """
    report = Report(row.name)
    if not present(row, root):
        report.missing = True
        report.problems.append(UserError(how_to_get(row, root)))
        return report
    by_split: dict[str, Samples | None] = {}
    names = ("test",) if row.trains_on else SPLITS
    for split in names:
        try:
            with ignore_stored():  # do not trust listings of earlier runs
                by_split[split] = read(row, root, split)
        except UserError as error:
            if error.args not in [problem.args for problem in report.problems]:
                report.problems.append(error)
    if len(by_split) < len(names):
        return report
    try:
        splits = Splits(by_split.__getitem__)
        parts: dict[str, Samples] = {split: getattr(splits, split) for split in names}
    except UserError as error:
        report.problems.append(error.within(row.title))
        return report
    if row.own and not row.captions:
        labels = {split: samples.pairs[1] for split, samples in parts.items()}
        classes = parts["train"].classes
        alone = [f"the only class is {classes[0]!r}; add another"] if len(classes) == 1 else []
        several = parts["train"].sets is not None
        report.problems += map(UserError, [*remarks(labels, classes, balanced=several), *alone])
    if row.own and not len(parts["test"]):
        few = "the dataset has no test images, and too few training images to hold some out; add images"
        report.problems.append(UserError(few))
    for split, samples in parts.items():
        report.splits.append(_split(row, split, samples, sample, report.problems, tick))
    return report


def _split(
    row: DatasetSpec, split: str, samples: Samples, sample: int | None, problems: list[UserError], tick: Tick
) -> SplitReport:
    expected = row.counts.get(split)
    if expected is not None and len(samples) != expected:
        problems.append(UserError(f"{row.title}: {len(samples):,} {split} images, expected {expected:,}"))
    fewest = most = None
    if not row.captions:
        counts = np.bincount(samples.pairs[1], minlength=len(samples.classes))
        low, high = int(counts.argmin()), int(counts.argmax())
        fewest, most = (samples.classes[low], int(counts[low])), (samples.classes[high], int(counts[high]))
        empty = np.flatnonzero(counts == 0)
        # a class may be too small to hold some out, also in the user's own images
        if len(empty) and not row.own and (expected is None or expected >= len(counts)):
            few = f"{len(empty)} of {len(counts)} classes have no {split} images, the first: {fewest[0]!r}"
            problems.append(UserError(f"{row.title}: {few}"))
    chosen = evenly(len(samples), sample)
    unreadable = transparent = 0
    for complaints, count, clear in _decode(samples, chosen):
        transparent += clear
        problems += complaints[: max(0, MOST - unreadable)]
        unreadable += len(complaints)
        tick(count)
    if unreadable > MOST:
        problems.append(UserError(f"{row.title}: {unreadable - MOST:,} more {split} images cannot be read"))
    return SplitReport(split, len(samples), expected, fewest, most, len(chosen) - unreadable, transparent)


def _decode(samples: Samples, indices: Sequence[int]) -> Iterator[tuple[list[UserError], int, int]]:
    """Yield (errors, number of images, number of transparent ones) in chunks, with one thread per core."""
    rows, images = samples.rows[np.asarray(indices, dtype=np.int64)].tolist(), samples.images
    if not isinstance(images, EncodedImages):
        yield [], len(rows), 0
        return
    see_through = replace(images, background=None)

    def look(row: int) -> UserError | bool:
        """Return an error, or True if the image is transparent somewhere."""
        try:
            return bool((see_through.load(row)[..., 3:] < 255).any())
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            results = list(threads.map(look, chunk))
            yield [each for each in results if isinstance(each, UserError)], len(chunk), results.count(True)
