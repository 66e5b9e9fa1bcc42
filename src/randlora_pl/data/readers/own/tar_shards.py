"""Images in tar shards (WebDataset), read by a stored index: shard, byte range and label.

The sample order is a function of numbered samples, so that subsets, splits, resume and ranks work as for any other
dataset; each process reads only the bytes of its own samples.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.decode import decode
from randlora_pl.data.images.sources import EncodedImages
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.readers.own import tar_files as tars
from randlora_pl.data.readers.own.labels import source_split
from randlora_pl.data.readers.own.shard_index import ShardPaths, find, index
from randlora_pl.data.string_array import Strings
from randlora_pl.data.validate import check_templates
from randlora_pl.utils.errors import UserError, errors_in, near

NAMES = "classnames.txt"
TEMPLATES = ("templates.txt", "zeroshot_classification_templates.txt")
MOST_CLASSES = 1_000_000

log = logging.getLogger("randlora_pl")


@dataclass(frozen=True)
class ShardImages(EncodedImages):
    """Images inside tar files.

    Attributes:
        shards: Paths or URLs of the shards.
        shard: int64 (n,), shard index of each image.
        offset: int64 (n,), first byte of each image.
        length: int64 (n,), number of bytes.
        members: Member name of each image.
    """

    shards: Sequence[str]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    members: Strings

    def __len__(self) -> int:
        return len(self.shard)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Decode image ``index`` to RGB (see `decode`).

        Raises:
            UserError: The shard cannot be read, or has no image at this offset; the message names both.
        """
        shard = self.shards[self.shard[index]]
        content = tars.read_range(shard, int(self.offset[index]), int(self.length[index]))
        return decode(self.name(index), short, content, most_pixels=self.most_pixels, background=self.background)

    def suffix(self, index: int) -> str:
        """Return the suffix of the member."""
        return PurePath(str(self.members[index])).suffix.lower()

    def name(self, index: int) -> str:
        """Return ``SHARD:MEMBER``."""
        return f"{self.shards[self.shard[index]]}:{self.members[index]}"


def shards(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read the samples of one split.

    Splits are sub-folders (``train/``, ``val/``, ``test/``) or words in the names of the shards (``val-000.tar``).
    Labels are numbers or names; class names are in ``classnames.txt`` beside the shards, or are the sorted labels. A
    sample's key is the member name of its image, so that it does not depend on the location or split of the shards;
    if several shards use a name, the shard's name is prepended. Training samples are in the order of their keys,
    others in the order of the shards for sequential reading.

    Raises:
        UserError: Shards are missing or damaged, or labels are wrong.
    """
    del row
    shard_paths = find(root)
    names, templates = shard_paths.lines((NAMES,)), shard_paths.lines(TEMPLATES)
    there = shard_paths.by_split
    if "train" not in there and (split == "train" or not names):
        raise UserError(
            f"{shard_paths.title} has no train shards, only {', '.join(there)}. "
            f"Rename them to train-..., or put them into train/; testing alone needs {NAMES}"
        )
    own = source_split(split, {"train", *there}, shard_paths.title)
    if own is None:
        return None
    class_split = "train" if "train" in there else own  # the split whose labels define the classes
    found = index(shard_paths, own)
    of_classes = found if class_split == own else index(shard_paths, class_split)
    classes, by_name = _classes(shard_paths, class_split, of_classes, names)
    labels = _labels(shard_paths, own, found, classes, by_name)
    for note in found.notes:
        log.warning("%s", note)
    shard, offset, length = (found.columns[name] for name in ("shard", "offset", "length"))
    images = ShardImages(there[own], shard, offset, length, found.texts["members"])
    keys = found.texts.get("keys", found.texts["members"])
    prompts = tuple(template.replace("{c}", "{}") for template in templates)  # {c}: as in clip-benchmark's files
    with errors_in(shard_paths.beside):
        check_templates(prompts or None, captions=False)
    samples = Samples(images, np.arange(len(labels)), labels, keys, tuple(classes), templates=prompts)
    return samples.numbered(found.columns["numbers"])


def index_all(root: Path) -> None:
    """Build the index of every split for other processes."""
    shard_paths = find(root)
    for split in shard_paths.by_split:
        index(shard_paths, split)


def _classes(
    shard_paths: ShardPaths, split: str, found: listing.Found, names: Sequence[str]
) -> tuple[list[str], dict[str, int] | None]:
    """Return (class names, label of each name used by the shards, or None if they use numbers)."""
    used = list(found.texts["labels"])
    numeric = [text for text in used if _number(text) is not None]
    if numeric and len(numeric) < len(used):
        other = next(text for text in used if _number(text) is None)
        raise UserError(f"{shard_paths.title}: some labels are numbers ({numeric[0]}), others are names ({other!r})")
    if numeric:
        top = max(numeric, key=int)
        if int(top) >= MOST_CLASSES:
            raise UserError(f"{_first(shard_paths, split, found, top)}: the label {top} cannot be a class number")
        return list(names) or [f"class {number}" for number in range(int(top) + 1)], None
    classes = list(names) if set(used) <= set(names) else sorted(used)
    if names and len(classes) != len(names):
        strange = next(text for text in classes if text not in names)
        raise UserError(
            f"{shard_paths.title}: {NAMES} has {len(names)} classes, but not {strange!r}, which is a label of the "
            f"shards.{near(strange, names)}"
        )
    return list(names) or classes, {name: number for number, name in enumerate(classes)}


def _labels(
    shard_paths: ShardPaths, split: str, found: listing.Found, classes: Sequence[str], by_name: dict[str, int] | None
) -> NDArray[np.int64]:
    """Return the label of each sample."""
    labels = []
    for text in found.texts["labels"]:
        label = _number(text) if by_name is None else by_name.get(text)
        if label is None or not 0 <= label < len(classes):
            least = f"a number from 0 to {len(classes) - 1}" if by_name is None else "a class of the train shards"
            hint = near(text, by_name or ())
            raise UserError(f"{_first(shard_paths, split, found, text)}: the label {text!r} is not {least}.{hint}")
        labels.append(label)
    return np.asarray(labels, dtype=np.int64)[found.columns["label"]]


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _first(shard_paths: ShardPaths, split: str, found: listing.Found, label: str) -> str:
    """Return the first image with a label, for messages."""
    number = list(found.texts["labels"]).index(label)
    position = int(np.argmax(found.columns["label"] == number))
    return f"{shard_paths.by_split[split][found.columns['shard'][position]]}:{found.texts['members'][position]}"
