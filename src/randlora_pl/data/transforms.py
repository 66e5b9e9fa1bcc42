"""Training and evaluation transforms: pure functions of the images, a seed and draw numbers (protocol of the paper).

Images are uint8 tensors of (height, width, channels) and any size; batches are float32 (b, 3, size, size).
Resizing is PyTorch's antialiased uint8 kernel, within one or two grey levels of Pillow's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from randlora_pl import rng

INTERPOLATIONS = ("bicubic", "bilinear")

RATIO = (3 / 4, 4 / 3)
"""Aspect ratios of training crops."""

_ATTEMPTS = 10  # crops tried before the centre is taken, as torchvision's RandomResizedCrop does


class ImageSpecLike(Protocol):
    """What a model says about its images (`randlora_pl.models.spec.ImageSpec`)."""

    @property
    def size(self) -> int:
        """Height and width in pixels."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel on [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel on [0, 1]."""

    @property
    def interpolation(self) -> str:
        """``bicubic`` or ``bilinear``."""


@dataclass(frozen=True)
class Frame:
    """How images are prepared; the default is CLIP's.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel on [0, 1].
        std: Standard deviation of each channel on [0, 1].
        interpolation: ``bicubic`` or ``bilinear``.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"

    @classmethod
    def of(cls, spec: ImageSpecLike) -> "Frame":
        """The frame that a model asks for."""
        return cls(spec.size, spec.mean, spec.std, spec.interpolation)


def crop_boxes(
    seed: int, draws: Tensor, heights: NDArray[np.int64], widths: NDArray[np.int64], scale: tuple[float, float]
) -> NDArray[np.int64]:
    """Random crop boxes: a uniform share of the area, a log-uniform aspect ratio in `RATIO`, a uniform place.

    Up to ten (share, ratio) pairs are tried; if none fits, the largest centred box of an allowed ratio is taken.

    Args:
        seed: The user's seed.
        draws: int64 (b,), draw numbers.
        heights: (b,), in pixels.
        widths: (b,), in pixels.
        scale: Least and greatest share of the area.

    Returns:
        (b, 4): top, left, height, width. NumPy, because PyTorch would wake its thread pool for these few numbers.
    """
    words = rng.words(seed, "crop", draws[:, None] * 32 + torch.arange(2 * _ATTEMPTS + 2))
    uniform = words.numpy() / 2.0**32
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * uniform[:, :_ATTEMPTS])
    ratio = np.exp(low + (high - low) * uniform[:, _ATTEMPTS : 2 * _ATTEMPTS])
    tried_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_w > 0) & (tried_h > 0) & (tried_w <= widths[:, None]) & (tried_h <= heights[:, None])
    first = np.arange(len(fits)), fits.argmax(1)
    some = fits.any(1)
    w = np.where(some, tried_w[first], np.minimum(widths, np.rint(heights * RATIO[1]).astype(np.int64)))
    h = np.where(some, tried_h[first], np.minimum(heights, np.rint(widths / RATIO[0]).astype(np.int64)))
    top = np.where(some, (uniform[:, -2] * (heights - h + 1)).astype(np.int64), (heights - h) // 2)
    left = np.where(some, (uniform[:, -1] * (widths - w + 1)).astype(np.int64), (widths - w) // 2)
    return np.stack((top, left, h, w), 1)


def flips(seed: int, draws: Tensor) -> Tensor:
    """Which draws are mirrored, each with probability 1/2: bool (b,)."""
    return rng.words(seed, "flip", draws) < 2**31


def train_batch(
    images: Sequence[Tensor], draws: Tensor, seed: int, frame: Frame, scale: tuple[float, float], flip: bool
) -> Tensor:
    """Random resized crop, optional horizontal flip, normalisation (protocol 2.6).

    Args:
        images: b images, uint8 (height, width, 1 or 3), all with the same number of channels.
        draws: int64 (b,), draw numbers; they and the seed decide everything.
        seed: The user's seed.
        frame: Size, mean, standard deviation and interpolation.
        scale: Least and greatest share of the area that a crop takes.
        flip: Whether to mirror half of the images.

    Returns:
        float32 (b, 3, size, size).
    """
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    boxes = crop_boxes(seed, draws, sizes[:, 0], sizes[:, 1], scale)
    batch = torch.empty((len(images), images[0].shape[2], frame.size, frame.size), dtype=torch.uint8)
    for place, (image, (top, left, h, w)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        batch[place] = _resize(image[top : top + h, left : left + w], frame.size, frame.size, frame.interpolation)
    if flip:
        mirrored = flips(seed, draws)
        batch[mirrored] = batch[mirrored].flip(-1)
    return normalise(batch, frame)


def eval_batch(images: Sequence[Tensor], frame: Frame) -> Tensor:
    """The shorter side resized to the frame, the centre cropped, normalisation (protocol 2.6).

    Args:
        images: b images, uint8 (height, width, 1 or 3), all with the same number of channels.
        frame: Size, mean, standard deviation and interpolation.

    Returns:
        float32 (b, 3, size, size).
    """
    size = frame.size
    batch = torch.empty((len(images), images[0].shape[2], size, size), dtype=torch.uint8)
    for place, image in enumerate(images):
        height, width = image.shape[:2]
        short = min(height, width)
        h, w = size * height // short, size * width // short
        top, left = round((h - size) / 2), round((w - size) / 2)
        batch[place] = _resize(image, h, w, frame.interpolation)[:, top : top + size, left : left + size]
    return normalise(batch, frame)


def _resize(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """uint8 (h, w, c) to uint8 (c, height, width)."""
    planes = image.permute(2, 0, 1)
    if planes.shape[1:] == (height, width):
        return planes
    return F.interpolate(planes[None], (height, width), mode=interpolation, antialias=True)[0]


def normalise(batch: Tensor, frame: Frame) -> Tensor:
    """uint8 (b, 1 or 3, h, w) to float32 (b, 3, h, w), grey repeated in the three channels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (frame.mean, frame.std))
    return batch.to(torch.float32).expand(-1, 3, -1, -1).mul(1 / (255 * std)).sub_(mean / std).contiguous()
