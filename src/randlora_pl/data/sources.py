"""Images in memory or in files, and their decoding: formats, limits and orientation."""

import errno
import io
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from randlora_pl.utils.errors import TooLargeImageError, UnreadableImageError, UserError
from randlora_pl.utils.files import is_file, read_plain

Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the formats of `SUFFIXES`, the only ones that are opened: for some others, such as PostScript,
it would start other programs."""

MOST_BYTES = 2**30
"""Maximum size of an image file."""

MOST_PIXELS = 178_956_970
"""Default maximum width x height of a decoded image: 512 MiB in memory."""

Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)

SKIP = "Replace it, or skip it with --data.on_error skip"
"""Hint for an unreadable image; commands without this option use another."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transform that undoes each EXIF orientation."""


class _TooLargeError(ValueError):
    pass


def decode(
    path: Path | str,
    short: int = 0,
    content: bytes | None = None,
    upright: bool = True,
    formats: Sequence[str] = FORMATS,
    most_pixels: int = MOST_PIXELS,
    background: Color | None = WHITE,
) -> Pixels:
    """Decode an image file to (height, width, 3) RGB, upright by its EXIF orientation.

    Transparent images are laid on a background, 16-bit gray is scaled to 8 bits (unless no value is above 255), and
    animations give their first frame.

    Args:
        path: Path of the file, or with ``content`` its name for messages.
        short: Minimum pixels of the shorter side: a JPEG with at least twice as many is decoded at 1/2, 1/4 or 1/8 of
            its size, if both sides are divisible, which takes a fraction of the time; 0 decodes in full size.
        content: Bytes of the file, if already read.
        upright: Apply the EXIF orientation.
        formats: Pillow's names of the accepted formats.
        most_pixels: Maximum width x height. Above the default, Pillow's own limit is off (see `trust_the_limit`).
        background: Color behind transparent pixels; None keeps the transparency, as a fourth channel.

    Raises:
        UnreadableImageError: The file cannot be read as an image, or is too large.
        UserError: The machine has too little memory, or too many open files.
    """
    if most_pixels > MOST_PIXELS:
        trust_the_limit()
    try:
        content = read_plain(path, MOST_BYTES) if content is None else content
        if not content:
            raise ValueError("it is empty")
        with Image.open(io.BytesIO(content), formats=known(formats)) as opened:
            if opened.width * opened.height > most_pixels:
                size = f"{opened.width} x {opened.height} = {opened.width * opened.height:,}"
                raise _TooLargeError(f"it has {size} pixels; the limit is {most_pixels:,}")
            whole = opened.size
            # the largest divisor of both sides that leaves enough pixels; others would shift the image
            possible = (f for f in (8, 4, 2) if short and min(whole) >= f * short and not any(s % f for s in whole))
            factor = next(possible, 1)
            opened.draft(opened.mode, (opened.width // factor, opened.height // factor))
            turn = _turn(opened) if upright else None
            if turn is None and opened.size == whole and (quick := _quick_jpeg(opened, content)) is not None:
                return quick
            image: Image.Image = opened if turn is None else opened.transpose(turn)
            if image.mode.startswith("I;16") or image.mode == "I":  # Pillow would clip these at 255
                grey = np.asarray(image)
                grey = grey >> 8 if grey.max(initial=0) > 255 else grey  # 8 bits in a 16-bit file stay visible
                return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range; convert it to 8 or 16 bits")
            if image.has_transparency_data:
                over = image.convert("RGBA")
                if background is None:
                    return np.array(over)
                image = Image.alpha_composite(Image.new("RGBA", over.size, (*background, 255)), over)
            return np.array(image.convert("RGB"))  # a copy: Pillow's own memory is read-only
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        what, number = f"The image {path} cannot be read: {_reason(error)}.", getattr(error, "errno", None)
        full = isinstance(error, MemoryError) or number in (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
        # a healthy image must not be skipped where memory or file handles ran out; the second message is Pillow's
        if full or (isinstance(error, OSError) and "out of memory" in str(error)):
            hint = "Close other programs, or use fewer workers, then run the command again"
            raise UserError(what, hint, str(path)) from error
        if isinstance(error, (_TooLargeError, Image.DecompressionBombError)):
            hint = "Replace it, allow it with --data.max_pixels N, or skip it with --data.on_error skip"
            raise TooLargeImageError(what, hint, str(path)) from error
        raise UnreadableImageError(what, SKIP, str(path)) from error


def _reason(error: Exception) -> str:
    """Return why an image cannot be decoded, without a full stop."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is not an image in one of the formats {', '.join(known(FORMATS))}"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than the limit of {MOST_PIXELS:,}"
    if isinstance(error, MemoryError):
        return "the machine is out of memory"
    return (str(getattr(error, "strerror", None) or error) or type(error).__name__).rstrip(".")


def known(formats: Sequence[str]) -> tuple[str, ...]:
    """Return the formats that Pillow was built with."""
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def trust_the_limit() -> None:
    """Disable Pillow's own size limit in this process, because `decode` checks the size."""
    Image.MAX_IMAGE_PIXELS = None


def _turn(opened: Image.Image) -> Image.Transpose | None:
    """Return the transform to an upright image, or None.

    `ImageOps.exif_transpose` would rewrite the whole EXIF block, which fails for unusual tags.
    """
    try:
        return _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block is ignored
        return None


def _quick_jpeg(opened: Image.Image, content: bytes) -> Pixels | None:
    """Decode an ordinary JPEG in full size with torchvision: the same pixels in two thirds of Pillow's time.

    Return None for files that Pillow must decode: other formats, CMYK, and truncated files, which torchvision would
    fill with gray.
    """
    if opened.format != "JPEG" or opened.mode not in ("RGB", "L") or not content.endswith(b"\xff\xd9"):
        return None
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        planes = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:  # damaged, or torchvision was built without a decoder
        return None
    pixels: Pixels = planes.permute(1, 2, 0).contiguous().numpy()
    return pixels


class Images(Protocol):
    """Numbered collection of images."""

    def __len__(self) -> int: ...

    def load(self, index: int, short: int = 0) -> Pixels:
        """Load image ``index`` as a (height, width, channels) array of 0..255 with 1 or 3 channels.

        ``short`` allows a smaller copy with at least this many pixels on the shorter side; 0 means full size.
        """

    def name(self, index: int) -> str:
        """Return the name of image ``index`` for messages."""


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory.

    Attributes:
        array: uint8 (n, height, width, channels).
        title: Name of the dataset, for messages.
    """

    array: Pixels
    title: str

    def __len__(self) -> int:
        return len(self.array)

    def load(self, index: int, short: int = 0) -> Pixels:
        """Return image ``index``."""
        image: Pixels = self.array[index]
        return image

    def name(self, index: int) -> str:
        """Return the dataset's name and the index."""
        return f"{self.title} {index}"


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
            try:
                place = home / (folder or ("/" if name.startswith("/") else ""))
                there[folder] = frozenset(os.listdir(place))  # noqa: PTH208 (a million Path objects are slow)
            except (OSError, ValueError):  # a null byte
                there[folder] = frozenset()
        if file not in there[folder] and not is_file(home / name):
            missing.append(position)
    return missing


@dataclass(frozen=True)
class EncodedImages(Images):
    """Base of images that are decoded on each access.

    Attributes:
        most_pixels: Maximum width x height of an image.
        background: Color behind transparent pixels; None keeps the transparency (see `decode`).
    """

    most_pixels: int = field(default=MOST_PIXELS, kw_only=True)
    background: Color | None = field(default=WHITE, kw_only=True)

    def load(self, index: int, short: int = 0) -> Pixels:
        """Decode image ``index`` to RGB; see `decode`, also for errors."""
        path, content = self.stored(index)
        return decode(path, short, content, most_pixels=self.most_pixels, background=self.background)

    def stored(self, index: int) -> tuple[Path | str, bytes | None]:
        """Return the path of image ``index`` and None, or its name for messages and the bytes of its file.

        Raises:
            UserError: The file, shard or cell in the message cannot be read.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FileImages(EncodedImages):
    """Image files, decoded on each access.

    Attributes:
        names: Paths, absolute or relative; a million Path objects would take seconds and a gigabyte.
        home: Folder of the relative paths.
    """

    names: Sequence[str | Path]
    home: Path = Path()

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return the path of image ``index``."""
        return self.home / self.names[index]

    def stored(self, index: int) -> tuple[Path, None]:
        """Return the path of image ``index`` and None."""
        return self.path(index), None

    def name(self, index: int) -> str:
        """Return the path of the file."""
        return str(self.path(index))


@dataclass(frozen=True)
class BoxImages(FileImages):
    """Crops of image files, decoded on each access.

    Attributes:
        boxes: int64 (n, 4): left, upper, right and lower edge, the last two exclusive.
    """

    boxes: Ints = field(kw_only=True)

    def load(self, index: int, short: int = 0) -> Pixels:
        """Decode crop ``index`` in RGB, in full size; a box outside its image is an error, too."""
        left, upper, right, lower = self.boxes[index].tolist()
        whole = decode(  # boxes refer to the stored pixels
            self.path(index), upright=False, most_pixels=self.most_pixels, background=self.background
        )
        part = whole[upper:lower, left:right]
        if not part.size:
            size = f"{whole.shape[1]} x {whole.shape[0]} pixels"
            raise UnreadableImageError(
                f"The box {left},{upper},{right},{lower} lies outside {self.path(index)} ({size})"
            )
        return part.copy()  # not a view that keeps the whole image in memory

    def name(self, index: int) -> str:
        """Return the path of the file and the box."""
        return f"{super().name(index)} {tuple(self.boxes[index].tolist())}"


@dataclass(frozen=True, eq=False)
class Strings(Sequence[str]):
    """Strings created on access. They load and pickle fast, and processes share them.

    Attributes:
        raw: uint8, the UTF-8 bytes of all strings; file names that are not UTF-8 keep their bytes.
        bounds: int64 (m + 1,), where each of m strings begins and ends in ``raw``.
        order: int64 (n,), the strings that are meant, in this order; None for all.
    """

    raw: Pixels
    bounds: Ints
    order: Ints | None = None

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "Strings":
        """Build from strings."""
        raw, bounds = bytearray(), array("q", [0])
        for text in texts:
            raw += text.encode("utf-8", "surrogateescape")
            bounds.append(len(raw))
        return cls(np.frombuffer(raw, np.uint8), np.frombuffer(bounds, np.int64))

    def take(self, indices: Ints) -> "Strings":
        """Return the strings at the given indices; the bytes are shared."""
        return Strings(self.raw, self.bounds, indices if self.order is None else self.order[indices])

    def __len__(self) -> int:
        return len(self.bounds) - 1 if self.order is None else len(self.order)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Strings": ...
    def __getitem__(self, index: int | slice) -> "str | Strings":
        """Return the string at an index."""
        places = range(len(self))[index]
        if isinstance(places, range):
            return self.take(np.asarray(places, dtype=np.int64))
        place = places if self.order is None else self.order[places]
        start, end = self.bounds[place : place + 2].tolist()
        return str(self.raw[start:end].data, "utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        content = self.raw.data
        for first in range(0, len(self), 1 << 16):  # Python numbers of all would take four times as much memory
            places = np.arange(first, min(first + (1 << 16), len(self)))
            places = places if self.order is None else self.order[places]
            for start, end in zip(self.bounds[places].tolist(), self.bounds[places + 1].tolist(), strict=True):
                yield str(content[start:end], "utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # compared by content, and holds arrays

    @property
    def is_ascii(self) -> bool:
        """True if no string needs several bytes for a character."""
        return bool(self.raw.max(initial=0) < 128)

    def sorted_places(self) -> Ints:
        """Return the indices that sort the strings, if they are short and plain without making them."""
        sizes = np.diff(self.bounds)
        if self.order is not None or sizes.max(initial=0) > 64 or not (self.raw.min(initial=1) > 0 and self.is_ascii):
            return np.asarray(sorted(range(len(self)), key=self.__getitem__), dtype=np.int64)
        block = np.zeros((len(self), max(1, sizes.max(initial=0))), np.uint8)
        block[np.arange(block.shape[1]) < sizes[:, None]] = self.raw
        return np.argsort(block.view(f"S{block.shape[1]}")[:, 0], kind="stable")
