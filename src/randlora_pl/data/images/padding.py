"""Training crops of the square around an image, so that nothing is cut off (`--data.resize longest`).

Boxes are (top, left, height, width) in pixels. The square around an image has its longer side; the image is centered.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]


def crop_place(
    uniform: NDArray[np.float64], crop: NDArray[np.int64], image: NDArray[np.int64], square: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the start of each crop of the square along one axis.

    A smaller crop lies within the image, a larger one around it: no padding is shown while a part of the image is cut
    off, and no crop is empty. If image and square have the same length, crops are uniform in the square.

    Args:
        uniform: (b,), numbers in [0, 1).
        crop: (b,), lengths of the crops.
        image: (b,), lengths of the images.
        square: (b,), lengths of the squares.
    """
    start = (square - image) // 2
    ends = np.stack((start, start + image - crop)).clip(0, square - crop)
    low, high = ends.min(0), ends.max(0)
    starts: NDArray[np.int64] = low + (uniform * (high - low + 1)).astype(np.int64)
    return starts


def split_crop(height: int, width: int, crop: Sequence[int], size: int) -> tuple[Box, Box]:
    """Return the part of an image inside a crop (a box in its square), and its box in the frame."""
    top, h, upper, tall = _axis(height, max(height, width), crop[0], crop[2], size)
    left, w, first, wide = _axis(width, max(height, width), crop[1], crop[3], size)
    return (top, left, h, w), (upper, first, tall, wide)


def _axis(image: int, square: int, begin: int, length: int, size: int) -> tuple[int, int, int, int]:
    """Return start and length in the image, start and length in the frame."""
    start = (square - image) // 2
    first, last = max(begin, start), min(begin + length, start + image)
    extent = max(1, round((last - first) * size / length))
    return first - start, last - first, min(round((first - begin) * size / length), size - extent), extent
