"""Datasets whose image files and labels are listed by a torchvision class, without decoding images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.readers.dispatch import Samples, file_samples, from_torchvision
from randlora_pl.utils.errors import UserError


def torchvision_files(
    row: DatasetSpec,
    root: Path,
    split: str,
    *,
    name: str,
    splits: Mapping[str, Sequence[str]],
    known: Sequence[str] | None = None,
    numbered: Sequence[str] = (),
) -> Samples | None:
    """Read a dataset of files listed by the class ``name`` of `torchvision.datasets`.

    ``splits`` has torchvision's splits for each of ours, ``known`` the expected class names; None if unknown without
    the files. In the splits ``numbered``, class folders are named by label; torchvision numbers existing folders.
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
                f"{len(row.classnames) - 1:05d} without gaps; {strays[0].parent.name} is unexpected"
            )
        entries += found
        classes = list(getattr(held, "classes", row.classnames))
        if len(classes) != row.classes or (known is not None and classes != list(known)):
            odd = sorted(set(known or ()) ^ set(classes))
            unlike = f"; {odd[0]!r} is not in both" if known is not None and odd else ""
            raise UserError(
                f"{row.title}, {part} part: its files in {root} have {len(classes)} classes, "
                f"expected {row.classes}{unlike}"
            )
    names = row.classnames or [str(name).replace("_", " ") for name in classes]
    return file_samples(row, root, root, entries, names, f"its {split} split")


def _entries(held: Any, root: Path) -> list[tuple[str, int]]:
    """Return (path below the root, label) per image of a torchvision class, from its private attributes."""
    if hasattr(held, "_samples"):
        pairs = held._samples
    else:
        files = held._images if hasattr(held, "_images") else held._image_files
        pairs = zip(files, held._labels, strict=True)
    return [(Path(path).relative_to(root).as_posix(), int(label)) for path, label in pairs]
