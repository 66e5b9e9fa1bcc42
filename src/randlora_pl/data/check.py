"""Verification of datasets on disk: counts, classes and decodable images, and contact sheets to look at."""

import os
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from randlora_pl.data.catalog import DatasetSpec, how_to_get, present
from randlora_pl.data.loader import remarks
from randlora_pl.data.readers import SPLITS, Samples, read
from randlora_pl.data.readers.trees import ignore_stored
from randlora_pl.data.sources import BLACK, EncodedImages
from randlora_pl.data.splits import Splits, few_shot
from randlora_pl.utils.errors import UserError, shorten
from randlora_pl.utils.files import atomic_file, disk_errors
from randlora_pl.utils.text import for_figure

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
            results = list(threads.map(look, chunk))
            yield [each for each in results if isinstance(each, UserError)], len(chunk), results.count(True)


MOST_CLASSES = 20
GAP = 3
THUMB = 88
"""Height and width of an image with its white edge, in pixels."""


@dataclass(frozen=True)
class Sheet:
    """Contents of a contact sheet: names and images of the classes shown, and prompts of the first one."""

    title: str
    caption: str
    names: list[str]
    images: list[list[NDArray[np.uint8]]]
    prompts: list[str]

    @classmethod
    def read(cls, row: DatasetSpec, root: Path, shots: int) -> "Sheet":
        """Read a dataset and choose the images of few-shot training with seed 0, or test images if it has no others.

        Args:
            row: Specification of the dataset.
            root: Folder (or file) of the dataset.
            shots: Images per class.

        Raises:
            UserError: The dataset is damaged.
        """
        from randlora_pl.data.module import ImageData  # `data check` does without Lightning

        data = ImageData(dataset=row.name, root=str(root), cache_images=False)
        shown = "test" if row.trains_on else "train"
        data.setup(shown if row.trains_on else None)
        samples = data.samples(shown)
        chosen = few_shot(samples.labels, samples.numbers, shots, data.seed)
        there = np.unique(samples.labels)
        labels = there[evenly(len(there), MOST_CLASSES)].tolist()
        images = []
        for label in labels:
            rows = samples.rows[chosen[samples.labels[chosen] == label]].tolist()
            try:
                images.append([samples.images.load(number) for number in rows])
            except UserError as error:
                below = f" --root {root}" if row.layout else ""
                check = f"randlora-pl data check {row.name}{below} --every-image"
                raise UserError(error.what, f"Run: {check}", error.where) from error
        splits = (shown,) if row.trains_on else SPLITS
        counts = ", ".join(f"{split} {len(data.samples(split)):,}" for split in splits)
        what = "captions" if row.captions else "classes"
        some = f"{len(labels)} of {len(there)} {what}, evenly chosen" if len(labels) < len(there) else f"all {what}"
        caption = f"Images: {counts}. Shown: {some}; up to {shots} {shown.replace('train', 'training')} images of each"
        prompts = [template.replace("{}", data.classnames[labels[0]]) for template in data.templates]
        return cls(row.title, caption, [data.classnames[label] for label in labels], images, prompts)

    def write(self, path: Path) -> None:
        """Draw a heading, then images below each class name, in as many columns as fit; write it as PNG atomically.

        Raises:
            UserError: The file cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        strip = max(max(map(len, self.images)) * THUMB, 2 * THUMB)
        columns = max(1, min(len(self.names), 1_200 // strip))
        lines = -(-len(self.names) // columns)
        width = max(columns * (strip + 16), 480)
        more = f" (and {len(self.prompts) - 1} more)" if len(self.prompts) > 1 else ""
        heading = [line for text in (self.title, self.caption, f"Prompt of the dataset: {self.prompts[0]}{more}")
                   for line in textwrap.wrap(text, width // 7)]  # fmt: skip
        figure = Figure((width / 100, (lines * (THUMB + 30) + 20 * len(heading)) / 100), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(for_figure("\n".join(heading)), x=0.01, ha="left", fontsize=9)
        panels = figure.subplots(lines, columns, squeeze=False).T.ravel()
        for axes in panels:
            axes.set_axis_off()
        for axes, name, images in zip(panels, self.names, self.images, strict=False):
            row = np.full((THUMB, strip, 3), 255, dtype=np.uint8)
            for place, image in enumerate(images):  # whole on a gray square; small ones keep their pixels visible
                drawn = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).convert("RGB")
                method = Image.Resampling.NEAREST if max(drawn.size) < THUMB else Image.Resampling.LANCZOS
                square = ImageOps.pad(drawn, (THUMB - 2 * GAP, THUMB - 2 * GAP), method, "#dddddd")
                row[:, place * THUMB : (place + 1) * THUMB] = np.asarray(ImageOps.expand(square, GAP, "white"))
            axes.imshow(row, interpolation="none")
            axes.set_title(for_figure(shorten(" ".join(name.split()), strip // 7)), loc="left", fontsize=9)
        with disk_errors(path), atomic_file(path) as stream:
            figure.savefig(stream, format="png")
