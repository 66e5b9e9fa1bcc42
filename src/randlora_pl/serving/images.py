"""Which uploads are taken: judged by the image's header, before a pixel is decoded."""

import io
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from randlora_pl.data.images.decode import FORMATS, known
from randlora_pl.utils.errors import first_line

TAKEN = tuple(name for name in FORMATS if name != "AVIF")
"""No AVIF: 1.5 kB declared as 64 x 64 pixels, with a stream of 9000 x 9000 inside, were decoded without complaint."""


@dataclass(frozen=True)
class Limits:
    """What an upload may cost.

    Attributes:
        upload_bytes: Of the body of a request.
        pixels: Of an image, width x height.
    """

    upload_bytes: int
    pixels: int


class RefusedError(Exception):
    """An upload that is not taken.

    Attributes:
        status: The HTTP status to answer with, 4xx.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def check_header(content: bytes, limits: Limits) -> int:
    """Refuses what is no image or declares too many pixels; Pillow reads the header and decodes nothing here.

    Args:
        content: The file's bytes.
        limits: What is allowed.

    Returns:
        Its pixels, width x height.

    Raises:
        RefusedError: With 400, 413, 415 or 422.
    """
    if not content:
        raise RefusedError(400, "the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=known(TAKEN)) as opened:
            width, height = opened.size
    except UnidentifiedImageError:
        raise RefusedError(415, f"this is no image in one of the formats {', '.join(known(TAKEN))}") from None
    except Exception as error:  # ValueError for a text chunk that unpacks to megabytes, struct.error and more
        raise RefusedError(422, f"the image's header is damaged: {first_line(error)}") from None
    if width * height > limits.pixels:
        size = f"{width} x {height} = {width * height:,} pixels"
        raise RefusedError(413, f"the image has {size}, and {limits.pixels:,} are allowed; make it smaller")
    return width * height
