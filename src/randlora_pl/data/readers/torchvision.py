"""Data sets whose image files and labels a torchvision class lists (without decoding an image)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from randlora_pl.data.catalog.spec import Row
from randlora_pl.data.readers.common import file_samples
from randlora_pl.data.readers.dispatch import Samples, from_torchvision
from randlora_pl.utils.errors import UserError


def torchvision_files(
    row: Row,
    root: Path,
    split: str,
    *,
    name: str,
    splits: Mapping[str, Sequence[str]],
    known: Sequence[str] | None = None,
    numbered: Sequence[str] = (),
) -> Samples | None:
    """A data set of files that a torchvision class reads.

    Args:
        row: The data set.
        root: Folder given to torchvision.
        split: ``train``, ``val`` or ``test``.
        name: Name of the class in `torchvision.datasets`.
        splits: Torchvision's splits that make up each of ours; a split that is left out is not there.
        known: The class names that torchvision should find; None: none can be told without the files.
        numbered: Torchvision's splits whose class folders are called by their label; it numbers what it finds.

    Raises:
        UserError: The data are missing or damaged.
    """
    entries: list[tuple[str, int]] = []
    classes: Sequence[str] = ()
    if split not in splits:
        return None
    for part in splits[split]:
        held = from_torchvision(row, root, name, split=part)
        found = _entries(held, root)
        strays = [Path(path) for path, label in found if Path(path).parent.name != f"{label:05d}"]
        if part in numbered and strays:
            raise UserError(
                f"{row.title}: the class folders of {root / strays[0].parents[1]} should be 00000 to "
                f"{len(row.classnames) - 1:05d}, each of them; {strays[0].parent.name} is out of place"
            )
        entries += found
        classes = list(getattr(held, "classes", row.classnames))
        if len(classes) != row.classes or (known is not None and classes != list(known)):
            odd = sorted(set(known or ()) ^ set(classes))
            unlike = f"; {odd[0]!r} is not in both" if known is not None and odd else ""
            raise UserError(
                f"{row.title}, {part} part: its files in {root} name {len(classes)} classes, "
                f"expected are {row.classes}{unlike}"
            )
    names = row.classnames or [str(name).replace("_", " ") for name in classes]
    return file_samples(row, root, root, entries, names, f"its {split} split")


def _entries(held: Any, root: Path) -> list[tuple[str, int]]:
    """(path below the root, label) of what a torchvision class has listed; it has no public name for either."""
    if hasattr(held, "_samples"):
        pairs = held._samples
    else:
        files = held._images if hasattr(held, "_images") else held._image_files
        pairs = zip(files, held._labels, strict=True)
    return [(Path(path).relative_to(root).as_posix(), int(label)) for path, label in pairs]
