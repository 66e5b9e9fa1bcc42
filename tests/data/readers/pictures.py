"""Image files whose colour says the label, in the modes that real datasets hold."""

from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (24, 16)
"""Width and height of most images."""

KINDS = ("rgb", "exif", "cmyk", "rgb", "palette", "rgba", "grey", "rgb")
"""Modes in turn; the palette and RGBA ones are PNG files, whatever their name says (ImageNet has such a file)."""

ORIENTATION = 0x0112


@dataclass
class Made:
    """What a builder has written.

    Attributes:
        sizes: Images of each class in each of the format's own splits.
        names: Class names by label, where the files say them.
        checksums: Files whose MD5 torchvision wants to know, relative to the root.
    """

    sizes: dict[str, int]
    names: list[str] = field(default_factory=list)
    checksums: tuple[str, ...] = ()


def colour(label: int) -> tuple[int, int, int]:
    """A colour for each label up to 999: a decimal digit for each channel, 25 levels apart."""
    return (15 + 25 * (label // 100), 15 + 25 * (label // 10 % 10), 15 + 25 * (label % 10))


def label_of(pixel: np.ndarray) -> int | None:
    """The label that a colour stands for; None for grey, which stands for any."""
    hundreds, tens, ones = (round((int(value) - 15) / 25) for value in pixel)
    return None if int(pixel.max()) - int(pixel.min()) < 12 else 100 * hundreds + 10 * tens + ones


@cache
def picture(label: int, kind: str = "rgb", size: tuple[int, int] = SIZE) -> bytes:
    """An encoded image of one of the `KINDS`, or ``ppm``."""
    image = Image.new("RGB", size, colour(label))
    packed = BytesIO()
    if kind == "exif":  # stored lying on its side: upright it is (height, width)
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        image.save(packed, "JPEG", quality=95, exif=exif)
    elif kind == "palette":
        image.quantize(4).save(packed, "PNG")
    elif kind == "rgba":
        clear = image.convert("RGBA")
        clear.putpixel((0, 0), (0, 0, 0, 0))
        clear.save(packed, "PNG")
    elif kind == "ppm":
        image.save(packed, "PPM")
    else:
        mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
        image.convert(mode).save(packed, "JPEG", quality=95)
    return packed.getvalue()


class Writer:
    """Writes images, each of the next kind, and makes folders where needed."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, path: Path, label: int, kind: str | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(label, kind or KINDS[self._count % len(KINDS)]))
        self._count += 1


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def known(data_set: str) -> list[str]:
    """What a dataset's own files call its classes, from the list in the package."""
    import randlora_pl.data

    home = Path(randlora_pl.data.__file__).parent / "names"
    return [line.split("\t")[0] for line in (home / f"{data_set}.txt").read_text(encoding="utf-8").splitlines()]
