"""Pascal VOC 2007 as single-label classification: each annotated box is an image."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from randlora_pl.data.catalog.spec import DatasetSpec
from randlora_pl.data.images.sources import BoxImages
from randlora_pl.data.readers.common import lines
from randlora_pl.data.readers.dispatch import Samples, in_key_order, missing
from randlora_pl.utils.errors import UserError


def boxes(row: DatasetSpec, root: Path, split: str, *, known: tuple[str, ...]) -> Samples:
    """Read every box of one split's images, including difficult ones, cropped without a margin.

    ``known`` has the class names in the annotations, by label.
    """
    home = root / "VOCdevkit" / "VOC2007"
    label_of = {name: label for label, name in enumerate(known)}
    paths: list[Path] = []
    corners: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    keys: list[str] = []
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
            paths.append(home / "JPEGImages" / f"{image}.jpg")
            corners.append(corner)
            labels.append(label_of[name])
            keys.append(f"{image}/{index:03d}")
    images = BoxImages(paths, boxes=np.asarray(corners, dtype=np.int64).reshape(-1, 4))
    return in_key_order(images, labels, keys, row.classnames)


def _objects(row: DatasetSpec, root: Path, path: Path) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return (class, (left, upper, right, lower)) per object of an annotation, without the boxes of its parts.

    Corners in the file are inclusive and count from 1; results count from 0, with exclusive ends.
    """
    try:
        found = []
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
            found.append((name.strip(), (max(left, 1) - 1, max(upper, 1) - 1, right, lower)))
        if not found:
            raise ValueError("no object is annotated")
        return found
    except FileNotFoundError as error:
        raise missing(row, root, f"{path} does not exist") from error
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise UserError(f"The annotation {path} cannot be read: {error}") from error
