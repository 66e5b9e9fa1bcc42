"""A user's own folder of images: the sub-folders are the classes."""

import csv
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from randlora_pl.data.catalog import Row
from randlora_pl.data.images import FileImages, is_image
from randlora_pl.data.readers import Samples, in_key_order
from randlora_pl.errors import UserError, near

ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}

log = logging.getLogger("randlora_pl")

TREE = "expected {root}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE with val/ and test/ beside train/"


def folder(row: Row, root: Path, split: str, *, download: bool) -> Samples | None:
    """Images below ``root``: with a ``train`` folder of class folders the splits are on disk, else all is ``train``.

    The classes are the sorted sub-folders of the train split. A lone ``val`` folder serves as ``test``, because
    accuracy is reported on images that chose nothing; validation images then come from the train split.

    Raises:
        UserError: No such folder, no classes, an empty class, or a class that the train split lacks.
    """
    del row, download
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}: {TREE.format(root=root)}. Set it with --data.root PATH")
    found = _split_folders(root)
    if split == "test" and found.get("test", root).name.lower() in ALIASES["val"]:
        log.warning("%s has no test folder: its val folder is used for testing", root)
    home = found.get(split, None if "train" in found else root if split == "train" else None)
    if home is None:
        return None
    classes = class_folders(found.get("train", root))
    if split != "train":
        classes_here = class_folders(home)
        unknown = [name for name in classes_here if name not in classes]
        if unknown:
            raise UserError(
                f"The class {unknown[0]!r} is in {home} but not in {found['train']}.{near(unknown[0], classes)}"
                " Every class needs training images"
            )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = list_images(home / name)
        if not files and split == "train":
            raise UserError(f"The class folder {home / name} holds no images (.jpg, .png ...): add some or delete it")
        paths += files
        labels += [label] * len(files)
    keys = [path.relative_to(home).as_posix() for path in paths]
    return in_key_order(FileImages(paths), labels, keys, classes)


def _split_folders(root: Path) -> dict[str, Path]:
    """The split folders below ``root``; empty if ``root`` holds the classes themselves."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    found: dict[str, Path] = {}
    for split, names in ALIASES.items():
        for name in names:
            if name in folders:
                found.setdefault(split, folders[name])
    if "train" not in found or not _sub_folders(found["train"]):
        return {}  # a class may be called "train"
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def _sub_folders(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir() if path.is_dir() and not path.name.startswith("."))


def class_folders(home: Path) -> list[str]:
    """Sorted names of the class folders in ``home``.

    Raises:
        UserError: There are none.
    """
    names = _sub_folders(home)
    if not names:
        loose = " (there are images in it, but a class is a sub-folder)" if any(map(is_image, home.iterdir())) else ""
        raise UserError(f"The data folder {home} has no class folders{loose}: {TREE.format(root=home)}")
    return names


def list_images(home: Path) -> list[Path]:
    """All image files below ``home``, hidden files and folders left out; links to folders are followed."""
    if not home.is_dir():
        return []
    files: list[Path] = []
    for place, folders, names in os.walk(home, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [path for name in sorted(names) if is_image(path := Path(place, name))]
    return files


def read_classnames(path: Path, classes: Sequence[str]) -> list[str]:
    """Class names from a file: one a line in the order of the classes, CSV ``folder,name``, or a JSON mapping.

    Args:
        path: The file; its suffix says which of the three it is.
        classes: The data set's own names (for a folder: the sub-folders), by label.

    Returns:
        A name for each class.

    Raises:
        UserError: The file is missing, names too few or too many classes, or an unknown one.
    """
    if not path.is_file():
        raise UserError(f"The class name file {path} does not exist (--data.classnames)")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            loaded = json.loads(text)
            if isinstance(loaded, list):
                return _one_each(path, [str(name) for name in loaded], classes)
            return _mapped(path, {str(key): str(name) for key, name in loaded.items()}, classes)
        if path.suffix.lower() == ".csv":
            lines = [line for line in csv.reader(text.splitlines()) if line]
            for line in lines:
                if len(line) != 2:
                    raise UserError(f"{path}: {','.join(line)!r} is not of the form folder,name")
            lines = lines[1:] if lines and lines[0] == ["folder", "name"] else lines
            return _mapped(path, {key.strip(): name.strip() for key, name in lines}, classes)
        return _one_each(path, [line.strip() for line in text.splitlines() if line.strip()], classes)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, csv.Error) as error:
        raise UserError(f"The class name file {path} cannot be read: {error}") from error


def _one_each(path: Path, names: list[str], classes: Sequence[str]) -> list[str]:
    if len(names) != len(classes):
        raise UserError(f"{path} has {len(names)} class names, the data set has {len(classes)} classes")
    return names


def _mapped(path: Path, names: dict[str, str], classes: Sequence[str]) -> list[str]:
    for key in names:
        if key not in classes:
            raise UserError(f"{path} names the class {key!r}, which the data set lacks.{near(key, classes)}")
    missing = [name for name in classes if name not in names]
    if missing:
        raise UserError(f"{path} has no name for {len(missing)} of {len(classes)} classes, the first: {missing[0]!r}")
    return [names[name] for name in classes]
