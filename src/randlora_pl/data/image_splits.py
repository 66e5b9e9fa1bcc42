"""Splits of image datasets: read once, with the training subset, and cached in memory if small."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.data import splits
from randlora_pl.data.catalog.coop import MOST_VALIDATION_SHOTS
from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers.dispatch import Samples, read
from randlora_pl.data.schedule import samples_drawn
from randlora_pl.data.shared_cache import CachedImages, meeting
from randlora_pl.data.sources import WHITE, ArrayImages, Color, EncodedImages
from randlora_pl.data.splits import labels_of, of_half, read_draw, shots_of
from randlora_pl.data.validate import is_draw
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.reuse import cached

log = logging.getLogger("randlora_pl")

FEW_SHOT_EPOCHS = 10
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
            self._warn_if_partial(split, len(whole))
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
    def usual_epochs(self) -> int:
        """Default number of passes over the training images."""
        return FEW_SHOT_EPOCHS if self.few else self.row.epochs

    def samples_drawn(self, count: int, global_batch: int, steps: int | None, epochs: int | None, least: int) -> int:
        """Return the samples that a run draws from ``count``: ``steps`` batches, or ``epochs``.

        Epochs have at least ``least`` batches for few-shot and own sets.
        """
        if epochs is None:
            return (steps or 0) * global_batch
        extend = self.few or self.row.own
        return samples_drawn(count, epochs, global_batch, least if extend else 0)

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

    def _warn_if_partial(self, split: str, count: int) -> None:
        expected = self.row.counts.get(split)
        if expected not in (None, count):
            option = f" --split {self.split}" if self.split != "default" else ""
            log.warning(
                "%s has %s %s images here, expected %s. For details, run: randlora-pl data check %s --root %s%s",
                self.row.name, f"{count:,}", split, f"{expected:,}", self.row.name, self.root, option,
            )  # fmt: skip

    def _cached(self, samples: Samples, few: bool) -> Samples:
        small = few or len(samples) <= SMALL_SET
        if isinstance(samples.images, ArrayImages) or not (small if self.cache_images is None else self.cache_images):
            return samples
        path = None if self.meeting_place is None else self.meeting_place / str(len(self.held))
        return replace(samples, images=CachedImages(samples.images, samples.rows, path=path))
