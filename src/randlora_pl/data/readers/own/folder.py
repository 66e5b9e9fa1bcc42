"""User folders of images, in which sub-folders are classes."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.decode import SUFFIXES, is_image
from randlora_pl.data.readers import listing_cache as listing
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.readers.own.labels import ALIASES, SPLIT_OF, source_split
from randlora_pl.utils.errors import UserError, near

TREE = "expected {root}/CLASS/IMAGE, or {root}/train/CLASS/IMAGE with val/ and test/ beside train/"


def folder(row: DatasetSpec, root: Path, split: str) -> Samples | None:
    """Read images below ``root``: splits from ``train``, ``val`` and ``test`` folders (see `source_split`), else all.

    The classes are the sorted sub-folders of the train split.

    Raises:
        UserError: The folder does not exist, has no classes, an empty class, or a class without training images.
    """
    del row
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"The data folder {root} {what}; {TREE.format(root=root)}. Set it with --data.root PATH")
    homes = _split_folders(root)
    source = source_split(split, homes, root)
    if source is None:
        return None
    home = homes[source]
    classes = list(class_folders(homes["train"]))
    here = class_folders(home)
    unknown = [name for name in here if name not in classes]
    if unknown:
        raise UserError(
            f"The class {unknown[0]!r} is in {home} but not in {homes['train']}.{near(unknown[0], classes)}"
            " Every class needs training images"
        )

    def find(watch: listing.Watch) -> listing.Found:
        paths: list[str] = []
        labels: list[int] = []
        ignored: Counter[str] = Counter()
        for label, name in enumerate(classes):
            files = image_names(here[name], ignored, watch) if name in here else []
            if not files and split == "train":
                raise UserError(f"The class folder {home / name} has no images (.jpg, .png ...). Add some or delete it")
            paths += [f"{here[name].name}/{file}" for file in files]
            labels += [label] * len(files)
        notes = []
        if ignored:
            most, _ = ignored.most_common(1)[0]
            kind = f"mostly {most}" if len(ignored) > 1 else most
            left_out = f"{ignored.total()} files in {home} are not images of a known type and are ignored"
            notes.append(f"{left_out} ({kind})")
        return listing.tree(paths, labels, [_nfc(path) for path in paths], notes)

    there = [path.name for path in here.values()]
    found_here = listing.stored(("folder", str(home.resolve()), split), (*classes, "", *there, str(home)), find)
    return listing.samples_of(found_here, home, classes)


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the folder of each split; only ``train`` if ``root`` has class folders."""
    folders = {path.name.lower(): path for path in root.iterdir() if path.is_dir()}
    there = {split: [folders[name] for name in names if name in folders] for split, names in ALIASES.items()}
    found = {split: homes[0] for split, homes in there.items() if homes}
    if "train" not in found or not _sub_folders(found["train"]):
        _refuse_half_split(root, found, len(folders))
        return {"train": root}  # a class may be named "train"
    return found


def _refuse_half_split(root: Path, found: dict[str, Path], folders: int) -> None:
    """Refuse folders named after splits without a proper layout: their images would be trained on as classes."""
    if len(found) > 1 and len(found) == folders:
        raise UserError(
            f"{found.get('train', root)} has no class folders, so its images have no labels; {TREE.format(root=root)}"
        )
    for split in ("val", "test"):
        if split in found and _sub_folders(found[split]):
            raise UserError(
                f"{found[split]} has class folders, but {root / 'train'} does not exist. "
                f"Put the other classes into {root / 'train'}"
            )


def _nfc(name: str) -> str:
    """Return a name with composed letters: file systems store accents differently."""
    return unicodedata.normalize("NFC", name)


def _sub_folders(home: Path) -> dict[str, Path]:
    folders = {_nfc(path.name): path for path in home.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return dict(sorted(folders.items()))


def class_folders(home: Path) -> dict[str, Path]:
    """Return the class folders in ``home`` by name, sorted; refuse none, and a single one that itself has several."""
    folders = _sub_folders(home)
    if not folders:
        loose = " (there are images in it, but a class is a sub-folder)" if any(map(is_image, home.iterdir())) else ""
        is_split = home.name.lower() in SPLIT_OF
        tree = f"expected {home}/CLASS/IMAGE" if is_split else TREE.format(root=home)
        raise UserError(f"The data folder {home} has no class folders{loose}; {tree}")
    if len(folders) == 1 and len(_sub_folders(only := next(iter(folders.values())))) > 1:
        raise UserError(f"The data folder {home} has only the folder {only.name}. Did you mean --data.root {only}?")
    return folders


def list_images(home: Path) -> list[Path]:
    """Return all image files below ``home`` (see `image_names`); [] if it is not a folder."""
    return [home / name for name in image_names(home, Counter(), os.fspath)] if home.is_dir() else []


def image_names(home: Path, ignored: Counter[str], watch: Callable[[str], object]) -> list[str]:
    """Return all image files below ``home``, without hidden files; links to folders are followed once.

    ``ignored`` receives the suffixes of other files; ``watch`` is called with each folder before it is listed.

    Returns:
        Paths relative to ``home`` with forward slashes.
    """
    files: list[str] = []
    seen: set[str] = set()
    watch(str(home))
    for directory, folders, names in os.walk(home, onerror=_refuse_unreadable, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a link to a folder above, or to a visited one
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            watch(os.path.join(directory, name))  # noqa: PTH118 (before it is listed)
        below = "" if directory == str(home) else Path(directory).relative_to(home).as_posix() + "/"
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name[name.rfind(".") :].lower() in SUFFIXES:  # not by a Path: there may be a million
                files.append(below + name)
            else:
                ignored[Path(name).suffix.lower() or name] += 1
    return files


def _refuse_unreadable(error: OSError) -> None:
    """Raise for an unreadable folder, whose images would be ignored silently; ignore a deleted one."""
    if not isinstance(error, FileNotFoundError):
        raise UserError(f"The folder {error.filename} cannot be listed: {error.strerror}. Make it readable, or move it")
