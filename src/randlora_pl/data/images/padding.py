"""Position of an image in a square of the mean color, so that nothing is cut off (`--data.resize pad`).

Boxes are (top, left, height, width) in pixels. The square around an image has its longer side; the image is centered.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[int, int, int, int]


def whole_box(height: int, width: int, size: int) -> Box:
    """Return the box of a whole image: its longer side fills the frame, the other is centered."""
    long = max(height, width)
    h, w = (max(1, round(side * size / long)) for side in (height, width))
    return (size - h) // 2, (size - w) // 2, h, w


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


def clear_padding(batch: Tensor, boxes: Sequence[Box], mirror: Tensor | None) -> Tensor:
    """Set pixels outside the images to zero in place, which is the mean color after normalization.

    Args:
        batch: Batch (b, channels, size, size), already mirrored.
        boxes: Box of each image before mirroring.
        mirror: bool (b,), True for mirrored images; None for none.
    """
    size = batch.shape[-1]
    top, left, height, width = torch.tensor(boxes, device=batch.device).view(-1, 4, 1).unbind(1)
    if mirror is not None:
        left = torch.where(mirror[:, None], size - left - width, left)
    line = torch.arange(size, device=batch.device)
    rows, columns = ((line >= first) & (line < first + long) for first, long in ((top, height), (left, width)))
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return batch.masked_fill_(~inside, 0.0)
