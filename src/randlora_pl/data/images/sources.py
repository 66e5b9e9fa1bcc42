"""Image sources: an array in memory, or image files decoded on access."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.images.decode import MOST_PIXELS, WHITE, Color, decode
from randlora_pl.utils.errors import UnreadableImageError
from randlora_pl.utils.files.plain_files import is_file


class Images(Protocol):
    """Numbered collection of images."""

    def __len__(self) -> int: ...

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Load image ``index`` as a (height, width, channels) array of 0..255 with 1 or 3 channels.

        ``short`` allows a smaller copy with at least this many pixels on the shorter side; 0 means full size.
        """
        ...

    def name(self, index: int) -> str:
        """Return the name of image ``index`` for messages."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory.

    Attributes:
        array: uint8 of shape (n, height, width, channels).
        title: Name of the dataset, for messages.
    """

    array: NDArray[np.uint8]
    title: str

    def __len__(self) -> int:
        return len(self.array)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Return image ``index``."""
        image: NDArray[np.uint8] = self.array[index]
        return image

    def name(self, index: int) -> str:
        """Return the dataset's name and the index."""
        return f"{self.title} {index}"


@dataclass(frozen=True)
class PathsBelow:
    """Sequence of paths that are created on access: a million Path objects take seconds and a gigabyte.

    Attributes:
        home: Parent folder.
        names: Relative paths with forward slashes.
    """

    home: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return self.home / self.names[index]


def absent(home: Path, names: Sequence[str]) -> list[int]:
    """Return the indices of names that are not files.

    Each folder is listed once. Names missing in a listing are checked individually, because the file system may ignore
    case or accents where a listing does not. Names have forward slashes and are relative to ``home``, or absolute.
    """
    there: dict[str, frozenset[str]] = {}
    missing = []
    for position, name in enumerate(names):
        folder, _, file = name.rpartition("/")
        if folder not in there:
            there[folder] = _file_names(home / (folder or ("/" if name.startswith("/") else "")))
        if file not in there[folder] and not is_file(home / name):
            missing.append(position)
    return missing


def _file_names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208 (a million Path objects are slow)
    except (OSError, ValueError):  # a null byte
        return frozenset()


@dataclass(frozen=True)
class EncodedImages:
    """Base of images that are decoded on each access.

    Attributes:
        most_pixels: Maximum width x height of an image.
        background: Color behind transparent pixels.
    """

    most_pixels: int = field(default=MOST_PIXELS, kw_only=True)
    background: Color = field(default=WHITE, kw_only=True)

    def suffix(self, index: int) -> str:
        """Return the suffix of the file of image ``index``, in lower case; empty if it has none."""
        raise NotImplementedError


@dataclass(frozen=True)
class FileImages(EncodedImages):
    """Image files.

    Attributes:
        paths: Paths of the files.
    """

    paths: Sequence[Path] | PathsBelow

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Decode image ``index`` to RGB; see `decode`, also for errors."""
        return decode(self.paths[index], short, most_pixels=self.most_pixels, background=self.background)

    def suffix(self, index: int) -> str:
        """Return the suffix of the file."""
        return self.paths[index].suffix.lower()

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return str(self.paths[index])


@dataclass(frozen=True)
class BoxImages(FileImages):
    """Crops of image files, decoded on each access.

    Attributes:
        paths: Path of each crop's file.
        boxes: int64 (n, 4): left, upper, right and lower edge, the last two exclusive.
    """

    boxes: NDArray[np.int64] = field(kw_only=True)

    def load(self, index: int, short: int = 0) -> NDArray[np.uint8]:
        """Decode crop ``index`` in RGB, in full size; a box outside its image is an error, too."""
        left, upper, right, lower = self.boxes[index].tolist()
        whole = decode(  # boxes refer to the stored pixels
            self.paths[index], upright=False, most_pixels=self.most_pixels, background=self.background
        )
        part = whole[upper:lower, left:right]
        if not part.size:
            size = f"{whole.shape[1]} x {whole.shape[0]} pixels"
            raise UnreadableImageError(
                f"The box {left},{upper},{right},{lower} lies outside {self.paths[index]} ({size})"
            )
        return part.copy()  # not a view that keeps the whole image in memory

    def name(self, index: int) -> str:
        """Return the path of the file and the box."""
        return f"{super().name(index)} {tuple(self.boxes[index].tolist())}"
