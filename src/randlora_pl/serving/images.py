"""Checks of uploaded images by their header, before any pixel is decoded."""

import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from randlora_pl.data.images.decode import FORMATS, known
from randlora_pl.utils.errors import first_line

TAKEN = tuple(name for name in FORMATS if name != "AVIF")
"""Accepted formats, without AVIF: a 1.5 kB file declared as 64 x 64 pixels was decoded to 9000 x 9000."""


@dataclass(frozen=True)
class Limits:
    """Limits of an upload.

    Attributes:
        upload_bytes: Maximum bytes of a request body.
        pixels: Maximum pixels of an image, width x height.
    """

    upload_bytes: int
    pixels: int


class RefusedError(Exception):
    """Rejected upload.

    Attributes:
        status: HTTP status of the response, 4xx.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def check_header(content: bytes, limits: Limits) -> int:
    """Check the image format and the declared size; Pillow reads the header and decodes nothing.

    Args:
        content: Bytes of the file.
        limits: Allowed sizes.

    Returns:
        Pixels of the image, width x height.

    Raises:
        RefusedError: The upload is refused, with status 400, 413, 415 or 422.
    """
    if not content:
        raise RefusedError(400, "the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=known(TAKEN)) as opened:
            width, height = opened.size
    except UnidentifiedImageError:
        raise RefusedError(415, f"not an image in one of the formats {', '.join(known(TAKEN))}") from None
    except Exception as error:  # ValueError for a text chunk that unpacks to megabytes, struct.error and more
        raise RefusedError(422, f"the image's header is damaged: {first_line(error)}") from None
    if width * height > limits.pixels:
        size = f"{width} x {height} = {width * height:,} pixels"
        raise RefusedError(413, f"the image has {size}; the limit is {limits.pixels:,}. Resize it")
    return width * height
