"""A user's own folder of images: the sub-folders are the classes."""

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from randlora_pl.data.catalog.spec import Row
from randlora_pl.data.images.decode import SUFFIXES, is_image
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.utils.errors import UserError, near

ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}

_SPLIT_NAMES = {name for names in ALIASES.values() for name in names}

log = logging.getLogger("randlora_pl")

TREE = "expected {root}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE with val/ and test/ beside train/"


def folder(row: Row, root: Path, split: str) -> Samples | None:
    """Images below ``root``: with a ``train`` folder of class folders the splits are on disk, else all is ``train``.

    The classes are the sorted sub-folders of the train split. A lone ``val`` folder serves as ``test``, because
    accuracy is reported on images that chose nothing; validation images then come from the train split.

    Raises:
        UserError: No such folder, no classes, an empty class, or a class that the train split lacks.
    """
    del row
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}: {TREE.format(root=root)}. Set it with --data.root PATH")
    found = _split_folders(root)
    if split == "test" and found.get("test", root).name.lower() in ALIASES["val"]:
        log.warning("%s has no test folder: its val folder is used for testing", root)
    home = found.get(split, None if "train" in found else root if split == "train" else None)
    if home is None:
        return None
    classes = list(class_folders(found.get("train", root)))
    here = class_folders(home)
    if split != "train":
        unknown = [name for name in here if name not in classes]
        if unknown:
            raise UserError(
                f"The class {unknown[0]!r} is in {home} but not in {found['train']}.{near(unknown[0], classes)}"
                " Every class needs training images"
            )

    def find(watch: listing.Watch) -> listing.Found:
        paths: list[str] = []
        labels: list[int] = []
        ignored: Counter[str] = Counter()
        for label, name in enumerate(classes):
            files = image_names(here[name], ignored, watch) if name in here else []
            if not files and split == "train":
                raise UserError(
                    f"The class folder {home / name} holds no images (.jpg, .png ...): add some or delete it"
                )
            paths += [f"{here[name].name}/{file}" for file in files]
            labels += [label] * len(files)
        notes = []
        if ignored:
            most, _ = ignored.most_common(1)[0]
            kind = f"mostly {most}" if len(ignored) > 1 else most
            left_out = f"{ignored.total()} files in {home} are no images of a known type and are left out"
            notes.append(f"{left_out} ({kind})")
        return listing.tree(paths, labels, [_nfc(path) for path in paths], notes)

    there = [path.name for path in here.values()]
    found_here = listing.stored(("folder", str(home.resolve()), split), (*classes, "", *there, str(home)), find)
    return listing.samples_of(found_here, home, classes)


def _split_folders(root: Path) -> dict[str, Path]:
    """The split folders below ``root``; empty if ``root`` holds the classes themselves."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    found: dict[str, Path] = {}
    for split, names in ALIASES.items():
        for name in names:
            if name in folders:
                found.setdefault(split, folders[name])
    if "train" not in found or not _sub_folders(found["train"]):
        _refuse_half_split(root, found, len(folders))
        return {}  # a class may be called "train"
    if "test" not in found and "val" in found:
        found["test"] = found.pop("val")
    return found


def _refuse_half_split(root: Path, found: dict[str, Path], folders: int) -> None:
    """Folders named after splits that are neither: their images would be trained on as classes.

    Raises:
        UserError: All folders are named after splits but hold no classes, or classes lie beside a test folder.
    """
    if len(found) > 1 and len(found) == folders:
        raise UserError(
            f"{found.get('train', root)} holds no class folders, so nothing says what its images show: "
            f"{TREE.format(root=root)}"
        )
    for split in ("val", "test"):
        if split in found and _sub_folders(found[split]):
            raise UserError(
                f"{found[split]} holds class folders, but there is no {root / 'train'} beside it: "
                f"put the other classes into {root / 'train'}"
            )


def _nfc(name: str) -> str:
    """A name with composed letters: file systems disagree on how an accent is stored."""
    return unicodedata.normalize("NFC", name)


def _sub_folders(home: Path) -> dict[str, Path]:
    folders = {_nfc(path.name): path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return dict(sorted(folders.items()))


def class_folders(home: Path) -> dict[str, Path]:
    """The class folders in ``home`` by name, sorted.

    Raises:
        UserError: There are none, or only one, which cannot be told apart from anything.
    """
    folders = _sub_folders(home)
    if not folders:
        loose = " (there are images in it, but a class is a sub-folder)" if any(map(is_image, home.iterdir())) else ""
        is_split = home.name.lower() in _SPLIT_NAMES
        tree = f"expected {home}/CLASS/IMAGE" if is_split else TREE.format(root=home)
        raise UserError(f"The data folder {home} has no class folders{loose}: {tree}")
    if len(folders) == 1 and len(_sub_folders(only := next(iter(folders.values())))) > 1:
        raise UserError(f"The data folder {home} holds the one folder {only.name}: did you mean --data.root {only}?")
    return folders


def list_images(home: Path) -> list[Path]:
    """All image files below ``home``, as by `image_names`; none where it is no folder."""
    return [home / name for name in image_names(home, Counter(), os.fspath)] if home.is_dir() else []


def image_names(home: Path, ignored: Counter[str], watch: Callable[[str], object]) -> list[str]:
    """All image files below ``home``, hidden files and folders left out; links to folders are followed, each once.

    Args:
        home: The folder.
        ignored: Receives the suffixes of the files that are no images.
        watch: Told each folder before it is listed.

    Returns:
        Paths relative to ``home`` with forward slashes.

    Raises:
        UserError: A folder may not be listed.
    """
    files: list[str] = []
    seen: set[str] = set()
    watch(str(home))
    for place, folders, names in os.walk(home, onerror=_refuse_unreadable, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above, or to one that was visited
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            watch(os.path.join(place, name))  # noqa: PTH118 (before the walk gets there)
        below = "" if place == str(home) else Path(place).relative_to(home).as_posix() + "/"
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name[name.rfind(".") :].lower() in SUFFIXES:  # not by a Path: there may be a million
                files.append(below + name)
            else:
                ignored[Path(name).suffix.lower() or name] += 1
    return files


def _refuse_unreadable(error: OSError) -> None:
    """Names a folder whose images would be left out without a word; one that has just gone is no loss."""
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"The folder {error.filename} cannot be listed: {error.strerror}. Make it readable, or move it")
