"""Datasets with annotation files in formats that torchvision does not read: lists, boxes, splits of CoOp, emoji."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np

from randlora_pl.data.catalog import SPLITS, DatasetSpec
from randlora_pl.data.readers import Samples, file_samples, in_key_order, lines, missing, wrong_line
from randlora_pl.data.sources import BoxImages
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import parse_json, read_plain


def resisc45(row: DatasetSpec, root: Path, split: str, *, known: tuple[str, ...]) -> Samples | None:
    """Read NWPU-RESISC45 by its published lists (``airplane_001.jpg``); the validation list is not used.

    ``known`` has the names of the class folders by label.
    """
    if split == "val":
        return None
    home = root / "resisc45"
    path = home / f"resisc45-{split}.txt"
    label_of = {name: label for label, name in enumerate(known)}
    entries = []
    for number, line in lines(row, root, path):
        parts = re.fullmatch(r"(\w+)_\d+\.jpg", line)
        if parts is None or parts[1] not in label_of:
            raise wrong_line(path, number, line, "CLASS_NUMBER.jpg with one of the 45 classes")
        entries.append((f"{parts[1]}/{line}", label_of[parts[1]]))
    return file_samples(row, root, home / "NWPU-RESISC45", entries, row.classnames, str(path))


def sun397(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read SUN397, first partition; ``ClassName.txt`` has classes such as ``/a/apartment_building/outdoor``."""
    if split == "val":
        return None
    home = root / "SUN397"
    classes = [line.strip("/") for _, line in lines(row, root, home / "ClassName.txt")]
    label_of = {name: label for label, name in enumerate(classes)}
    path = home / f"{'Training' if split == 'train' else 'Testing'}_01.txt"
    entries = []
    for number, line in lines(row, root, path):
        folder, _, image = line.strip("/").rpartition("/")
        if folder not in label_of or not image:
            raise wrong_line(path, number, line, "/CLASS/IMAGE.jpg with a class of ClassName.txt")
        entries.append((f"{folder}/{image}", label_of[folder]))
    names = [name[2:].replace("/", " ").replace("_", " ") for name in classes]  # without the letter's folder
    return file_samples(row, root, home, entries, names, str(path))


def cub200(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read CUB-200-2011: four files map image numbers to paths, classes and splits, and classes to names."""
    if split == "val":
        return None
    home = root / "CUB_200_2011"
    classes = _numbered(row, root, home / "classes.txt")
    images = _numbered(row, root, home / "images.txt")
    label_of = {number: label for label, number in enumerate(classes)}
    class_of = _numbered(row, root, home / "image_class_labels.txt")
    in_train = _numbered(row, root, home / "train_test_split.txt")
    for file, column in (("image_class_labels.txt", class_of), ("train_test_split.txt", in_train)):
        absent = [number for number in images if number not in column]
        if absent:
            raise UserError(f"{home / file} has no line for image {absent[0]} ({images[absent[0]]})")
    entries = []
    for number, path in images.items():
        if class_of[number] not in label_of:
            raise UserError(
                f"{home / 'image_class_labels.txt'}: image {number} has the unknown class {class_of[number]}"
            )
        if (in_train[number] == "1") == (split == "train"):
            entries.append((path, label_of[class_of[number]]))
    names = [name.partition(".")[2].replace("_", " ") for name in classes.values()]
    return file_samples(row, root, home / "images", entries, names, str(home / "images.txt"))


def _numbered(row: DatasetSpec, root: Path, path: Path) -> dict[str, str]:
    numbered: dict[str, str] = {}
    for line_number, line in lines(row, root, path):
        number, _, value = line.partition(" ")
        if not number.isdecimal() or not value:
            raise wrong_line(path, line_number, line, "NUMBER VALUE")
        if number in numbered:
            raise UserError(f"{path}, line {line_number}: {number} is listed twice")
        numbered[number] = value
    return numbered


def boxes(row: DatasetSpec, root: Path, split: str, *, known: tuple[str, ...]) -> Samples:
    """Read every box of one split's images, including difficult ones, cropped without a margin.

    ``known`` has the class names in the annotations, by label.
    """
    home = root / "VOCdevkit" / "VOC2007"
    label_of = {name: label for label, name in enumerate(known)}
    found: list[tuple[str, int, tuple[int, int, int, int]]] = []  # key, label and corners of each box
    seen: set[str] = set()
    path = home / "ImageSets" / "Main" / f"{split}.txt"
    there = {image.stem for image in (home / "JPEGImages").glob("*.jpg")}
    for number, line in lines(row, root, path):
        image = line.split()[0]
        if image in seen:
            raise UserError(f"{path}, line {number}: {image} is listed twice")
        seen.add(image)
        if image not in there:
            raise missing(row, root, f"{path}, line {number}: {home / 'JPEGImages' / image}.jpg does not exist")
        for index, (name, corner) in enumerate(_objects(row, root, home / "Annotations" / f"{image}.xml")):
            if name not in label_of:
                raise UserError(f"{home / 'Annotations' / image}.xml: {name!r} is not one of the {len(known)} classes")
            found.append((f"{image}/{index:03d}", label_of[name], corner))
    keys, labels = [key for key, _, _ in found], [label for _, label, _ in found]
    files = [f"{key.rpartition('/')[0]}.jpg" for key in keys]
    corners = np.asarray([corner for _, _, corner in found], dtype=np.int64).reshape(-1, 4)
    return in_key_order(BoxImages(files, home / "JPEGImages", boxes=corners), labels, keys, row.classnames)


def _objects(row: DatasetSpec, root: Path, path: Path) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return (class, (left, upper, right, lower)) per object of an annotation, without its parts' boxes."""
    try:
        objects = []
        for thing in ElementTree.parse(path).getroot().findall("object"):
            name, box = thing.findtext("name"), thing.find("bndbox")
            if name is None or box is None:
                raise ValueError("an object has no name or no bndbox")
            # by name: not all annotations have the corners in the same order
            left, upper, right, lower = (
                int(float(box.findtext(side) or "none")) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            if right < left or lower < upper:
                raise ValueError(f"the box {left},{upper},{right},{lower} is empty")
            # in the file they are inclusive and count from 1, here from 0 with exclusive ends
            objects.append((name.strip(), (max(left, 1) - 1, max(upper, 1) - 1, right, lower)))
        if not objects:
            raise ValueError("no object is annotated")
        return objects
    except FileNotFoundError as error:
        raise missing(row, root, f"{path} does not exist") from error
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(f"The annotation {path} cannot be read: {error}") from error


LARGEST = 1 << 26
"""Maximum size of a split file in bytes: the 101,000 images of Food-101 take about a tenth."""


def split_file(
    row: DatasetSpec, root: Path, split: str, *, file: str, images: str, underscores: bool = False
) -> Samples:
    """Read a dataset by its split file.

    ``file`` and ``images`` are the split file and the folder of the images, below the root. Underscores of class
    names become spaces, unless ``underscores`` is set.
    """
    path = root / file
    try:
        parts, names = _checked(parse_json(read_plain(path, LARGEST)))
    except (OSError, ValueError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        if row.files:  # `data get` explains how to get the split file as well
            raise missing(row, root, f"{path} {why}") from error
        raise UserError(
            f"{row.title}: CoOp's split file {path} {why}. Get it by the link in "
            "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md, or from "
            "https://huggingface.co/datasets/zhengli97/prompt_learning_dataset."
        ) from error
    classes = names if underscores else [name.replace("_", " ") for name in names]
    entries = [(image, label) for image, label, _ in parts[split]]
    return file_samples(row, root, root / images, entries, classes, f"the {split} part of {path}")


def _checked(content: Any) -> tuple[dict[str, list[tuple[str, int, str]]], list[str]]:
    """Return the entries of each split, and the class names by label; a wrong entry or label is a ValueError."""
    if not isinstance(content, dict) or any(not isinstance(content.get(split), list) for split in SPLITS):
        raise ValueError(f"it does not have the lists {', '.join(SPLITS)}")
    parts = {split: [_entry(split, n, entry) for n, entry in enumerate(content[split], 1)] for split in SPLITS}
    images = {split: {image for image, _, _ in entries} for split, entries in parts.items()}
    for first, second in combinations(SPLITS, 2):
        if both := images[first] & images[second]:
            raise ValueError(f"{brief(min(both))} is in {first} and in {second}")
    names: dict[int, str] = {}
    for _, label, name in chain.from_iterable(parts.values()):
        if names.setdefault(label, name) != name:
            raise ValueError(f"label {label} is called {brief(names[label])} and {brief(name)}")
    gap = next((label for label, number in enumerate(sorted(names)) if label != number), None)
    if gap is not None:
        raise ValueError(f"its {len(names)} labels should be 0 to {len(names) - 1}, but label {gap} is missing")
    return parts, [names[label] for label in sorted(names)]


def _entry(split: str, number: int, entry: Any) -> tuple[str, int, str]:
    where = f"{split} entry {number}, {brief(entry)}"
    match entry:
        case [str(image), int(label), str(name)] if not isinstance(label, bool) and name.strip():
            place = PureWindowsPath(image)  # it splits at both kinds of slashes
            if place.anchor or ".." in place.parts or not place.parts or "\0" in image:
                raise ValueError(f"{where}: the path leaves the folder of the images")
            (image + name).encode("utf-8")  # an escape in JSON may be half a character: a ValueError
            return image, label, name
    raise ValueError(f"{where}: it is not of the form [path, label, class name]")


_LIST, _IMAGES = Path("emoji", "emoji.json"), Path("emoji", "img")


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Attributes:
        code: Its code points, such as ``1F44B``.
        name: Its name or its first short name, whichever has fewer words; empty if neither has letters and spaces only.
        kinds: Its ``category`` and ``subcategory`` as class names.
        alike: True if it may be drawn exactly like another: flags, families, and emoji that another one replaces.
        images: File name of the image for each vendor and choice of skin tones, such as ``1F3FB`` or ``1F3FB-1F3FE``;
            the tone of the yellow one is empty.
    """

    code: str
    name: str
    kinds: dict[str, str]
    alike: bool
    images: dict[tuple[str, str], str]

    def named(self, words: int) -> bool:
        """Return True if it has a name of at most this many words."""
        return 0 < len(self.name.split()) <= words


def tones(row: DatasetSpec, root: Path, split: str, *, vendor: str, held_out: str, words: int) -> Samples | None:
    """Read the emoji that have skin tones; images with the tone ``held_out`` are for the test, all others for training.

    The classes are sorted by name. Of an emoji with two people, each image in which either has this tone is held out.
    Emoji whose name has more than ``words`` words are left out.
    """
    if split == "val":
        return None
    emoji_list = sorted(listed(row, root, [vendor]), key=lambda emoji: emoji.name)
    kept = [emoji for emoji in emoji_list if len(emoji.images) > 1 and emoji.named(words)]
    entries = [
        (image, label)
        for label, emoji in enumerate(kept)
        for (_, tone), image in emoji.images.items()
        if (held_out in tone) == (split == "test")
    ]
    home = root / _IMAGES / vendor / "64"
    return file_samples(row, root, home, entries, [emoji.name for emoji in kept], str(root / _LIST))


def names(
    row: DatasetSpec, root: Path, split: str, *, train: Sequence[str], test: Sequence[str], words: int
) -> Samples | None:
    """Read the emoji without skin tones by name: the images of some vendors for training, of others for the test.

    The classes are sorted by name. An emoji is left out if a vendor has not drawn it, if it may look exactly like
    another, and if its name has more than ``words`` words or is another's, too.
    """
    if split == "val":
        return None
    chosen = [
        emoji
        for emoji in listed(row, root, [*train, *test])
        if not emoji.alike and emoji.named(words) and all((vendor, "") in emoji.images for vendor in (*train, *test))
    ]
    often = Counter(emoji.name for emoji in chosen)
    kept = sorted((emoji for emoji in chosen if often[emoji.name] == 1), key=lambda emoji: emoji.name)
    entries = [
        (f"{vendor}/64/{emoji.images[vendor, '']}", label)
        for label, emoji in enumerate(kept)
        for vendor in (test if split == "test" else train)
    ]
    return file_samples(row, root, root / _IMAGES, entries, [emoji.name for emoji in kept], str(root / _LIST))


def kinds(row: DatasetSpec, root: Path, split: str, *, kind: str, vendors: Sequence[str], fewest: int) -> Samples:
    """Read the emoji without skin tones by ``kind``: ``category`` or ``subcategory``. Each is in one split only.

    The classes are sorted by name, and those with less than ``fewest`` emoji are left out. The SHA-256 of their codes
    orders the emoji of a class: the first fifth is for the test and the next tenth, at least one, for validation.
    Emoji that may look exactly like another are left out.
    """
    members = defaultdict(list)
    codes = lambda emoji: hashlib.sha256(emoji.code.encode(errors="replace")).digest()  # noqa: E731
    for emoji in sorted(listed(row, root, vendors), key=codes):
        if not emoji.alike:
            members[emoji.kinds[kind]].append(emoji)
    classes = sorted(name for name, emoji in members.items() if len(emoji) >= fewest)
    entries = []
    for label, name in enumerate(classes):
        test = len(members[name]) // 5
        val = test + max(1, len(members[name]) // 10)
        part = {"test": slice(test), "val": slice(test, val), "train": slice(val, None)}[split]
        for emoji in members[name][part]:
            images = [(vendor, emoji.images.get((vendor, ""))) for vendor in vendors]
            entries += [(f"{vendor}/64/{image}", label) for vendor, image in images if image]
    return file_samples(row, root, root / _IMAGES, entries, classes, str(root / _LIST))


def listed(row: DatasetSpec, root: Path, vendors: Sequence[str]) -> list[Emoji]:
    """Return the emoji in the list that any of these vendors has drawn, with the images of these vendors."""
    path = root / _LIST
    try:
        content = parse_json(read_plain(path, LARGEST))
        if not isinstance(content, list):
            raise ValueError("it is not a list")
        kept = []
        for entry in content:
            names = (entry["short_names"][0].replace("-", " ").replace("_", " "), (entry["name"] or "").lower())
            plain = [name for name in names if re.fullmatch("[a-z]+( [a-z]+)*", name)]
            images = {
                (vendor, tone): variant["image"]
                for vendor in vendors
                for tone, variant in {"": entry, **entry.get("skin_variations", {})}.items()
                if variant[f"has_img_{vendor}"]
            }
            for image in images.values():
                if not re.fullmatch(r"[0-9a-f-]+\.png", image):  # such as 1f44b-1f3fd.png
                    raise ValueError(f"{brief(image)} is not the name of an image")
            # as class names: ``sky & weather`` is ``sky and weather``, ``animal-bug`` is ``animal bug``
            kinds = {
                kind: entry[kind].lower().replace("&", "and").replace("-", " ") for kind in ("category", "subcategory")
            }
            alike = "obsoleted_by" in entry or kinds["category"] == "flags"
            alike |= kinds["subcategory"] in ("family", "person symbol")
            name = min(plain, key=lambda name: len(name.split()), default="")
            kept.append(Emoji(entry["unified"].lower(), name, kinds, alike, images))
        return [emoji for emoji in kept if emoji.images]
    except FileNotFoundError as error:
        raise missing(row, root, f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise missing(row, root, f"{path} cannot be read: {error}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise missing(row, root, f"{path} has other content: {type(error).__name__}: {error}") from error
