"""Verification of datasets on disk: counts, classes, and decodable images."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from randlora_pl.data.catalog.registry import how_to_get, present
from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import SPLITS, Samples, read
from randlora_pl.data.schedule import remarks
from randlora_pl.data.sources import BLACK, EncodedImages
from randlora_pl.data.splits import Splits
from randlora_pl.utils.errors import UserError

MOST = 5
"""Maximum number of unreadable images named per split."""

Tick = Callable[[int], None]
_CHUNK = 1_024


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
    found: dict[str, Samples | None] = {}
    names = ("test",) if row.trains_on else SPLITS
    for split in names:
        try:
            with listing.ignore_stored():  # do not trust listings of earlier runs
                found[split] = read(row, root, split)
        except UserError as error:
            if error.args not in [problem.args for problem in report.problems]:
                report.problems.append(error)
    if len(found) < len(names):
        return report
    try:
        splits = Splits(found.__getitem__)
        parts: dict[str, Samples] = {split: getattr(splits, split) for split in names}
    except UserError as error:
        report.problems.append(error.within(row.title))
        return report
    if row.own and not row.captions:
        labels = {split: samples.labels for split, samples in parts.items()}
        classes = parts["train"].classes
        alone = [f"the only class is {classes[0]!r}; add another"] if len(classes) == 1 else []
        report.problems += map(UserError, [*remarks(labels, classes), *alone])
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
        counts = np.bincount(samples.labels, minlength=len(samples.classes))
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


def evenly(count: int, most: int | None) -> list[int]:
    """Return at most ``most`` evenly spaced indices below ``count``; all of them for None."""
    if most is None or count <= most:
        return list(range(count))
    return [round(index) for index in np.linspace(0, count - 1, most).tolist()] if most else []


def _decode(samples: Samples, indices: Sequence[int]) -> Iterator[tuple[list[UserError], int, int]]:
    """Yield (errors, number of images, number of transparent ones) in chunks, with one thread per core."""
    rows, images = samples.rows[np.asarray(indices, dtype=np.int64)].tolist(), samples.images
    if not isinstance(images, EncodedImages):
        yield [], len(rows), 0
        return
    on_black = replace(images, background=BLACK)

    def look(row: int) -> UserError | bool:
        """Return an error, or True if the image is transparent somewhere."""
        try:
            pixels = images.load(row)
            opaque = images.suffix(row) in (".jpg", ".jpeg")
            return not opaque and not np.array_equal(pixels, on_black.load(row))
        except UserError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, len(rows), _CHUNK):
            chunk = rows[start : start + _CHUNK]
            found = list(threads.map(look, chunk))
            yield [each for each in found if isinstance(each, UserError)], len(chunk), found.count(True)
