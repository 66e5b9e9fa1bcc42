"""Datasets with annotation files in formats that torchvision does not read."""

import re
from pathlib import Path

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers.common import file_samples, lines, wrong_line
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.utils.errors import UserError


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
    images = home / "NWPU-RESISC45"
    if entries and not (images / entries[0][0]).is_file() and (images / Path(entries[0][0]).name).is_file():
        entries = [(Path(image).name, label) for image, label in entries]  # some copies have no class folders
    return file_samples(row, root, images, entries, row.classnames, str(path))


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
    """Return lines ``NUMBER VALUE`` as a mapping, in their order."""
    found: dict[str, str] = {}
    for line_number, line in lines(row, root, path):
        number, _, value = line.partition(" ")
        if not number.isdecimal() or not value:
            raise wrong_line(path, line_number, line, "NUMBER VALUE")
        if number in found:
            raise UserError(f"{path}, line {line_number}: {number} is listed twice")
        found[number] = value
    return found
