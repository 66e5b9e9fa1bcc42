"""Training and evaluation transforms: pure functions of images, seed and positions (protocol of the paper).

Images are uint8 tensors of (height, width, channels) and any size; batches are float32 (b, 3, size, size).
Resizing is torchvision's v2 kernel, antialiased on uint8, within one or two gray levels of Pillow's.

A batch is made in two steps: workers run `train_pixels` or `eval_pixels`, which return uint8 (a quarter of the bytes
to transfer), and `finish` does the rest in the worker or on the device.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from randlora_pl.data.images.augment import mixed
from randlora_pl.data.images.crops import crop_and_resize
from randlora_pl.data.images.frame import Frame
from randlora_pl.data.images.padding import Box, clear_padding, crop_place, split_crop, whole_box
from randlora_pl.utils import rng
from randlora_pl.utils.device import on_cuda

Change = Callable[[int, Tensor], Tensor]
"""Further change of an image, from its index in the batch and uint8 (channels, height, width)."""

RATIO = (3 / 4, 4 / 3)
"""Aspect ratios of training crops."""

_ATTEMPTS = 10  # crops tried before the center crop, as torchvision's RandomResizedCrop does


def crop_boxes(
    seed: int,
    positions: Tensor,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    scale: tuple[float, float],
    pad: bool = False,
) -> NDArray[np.int64]:
    """Return random crop boxes: uniform area fraction, log-uniform aspect ratio in `RATIO`, uniform position.

    Up to ten (fraction, ratio) pairs are tried; if none fits, the largest centered box of an allowed ratio is used.

    Args:
        seed: The user's seed.
        positions: int64 (b,), positions in the sample order.
        heights: Image heights (b,) in pixels.
        widths: Image widths (b,) in pixels.
        scale: Minimum and maximum area fraction.
        pad: Crop the square around each image instead (see `padding`).

    Returns:
        (b, 4): top, left, height, width. NumPy, because PyTorch would start its thread pool for these few numbers.
    """
    words = rng.words(seed, "crop", positions[:, None] * 32 + torch.arange(2 * _ATTEMPTS + 2))
    uniform = words.numpy() / 2.0**32
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    tall, wide = heights, widths  # of the images
    if pad:
        heights = widths = np.maximum(heights, widths)
    area = (heights * widths)[:, None] * (scale[0] + (scale[1] - scale[0]) * uniform[:, :_ATTEMPTS])
    ratio = np.exp(low + (high - low) * uniform[:, _ATTEMPTS : 2 * _ATTEMPTS])
    tried_w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    tried_h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (tried_w > 0) & (tried_h > 0) & (tried_w <= widths[:, None]) & (tried_h <= heights[:, None])
    first = np.arange(len(fits)), fits.argmax(1)
    some = fits.any(1)
    w = np.where(some, tried_w[first], np.minimum(widths, np.rint(heights * RATIO[1]).astype(np.int64)))
    h = np.where(some, tried_h[first], np.minimum(heights, np.rint(widths / RATIO[0]).astype(np.int64)))
    top = np.where(some, crop_place(uniform[:, -2], h, tall, heights), (heights - h) // 2)
    left = np.where(some, crop_place(uniform[:, -1], w, wide, widths), (widths - w) // 2)
    return np.stack((top, left, h, w), 1)


def flips(seed: int, positions: Tensor) -> Tensor:
    """Return which positions are mirrored, each with probability 1/2: bool (b,)."""
    return rng.words(seed, "flip", positions) < 2**31


def pixels_needed(frame: Frame, scale: tuple[float, float] | None) -> int:
    """Return the minimum shorter side in pixels to which `Images.load` may shrink an image.

    In training, no crop gets fewer pixels than the frame. In evaluation, where metrics are compared with published
    ones, resizing still at least halves the image, so that the decoder's own filter has almost no effect. A padded
    image would need fewer: its longer side fills the frame. ``scale`` is None in evaluation.
    """
    return 2 * frame.size if scale is None else math.ceil(frame.size / math.sqrt(scale[0] * RATIO[0]))


def train_pixels(
    images: Sequence[Tensor],
    positions: Tensor,
    seed: int,
    frame: Frame,
    scale: tuple[float, float],
    flip: bool,
    late: bool,
    change: Change | None = None,
) -> dict[str, Any]:
    """Return random resized crops and mirror flags (protocol 2.6).

    Args:
        images: b images, uint8 (height, width, 1 or 3), all with the same number of channels.
        positions: int64 (b,), positions in the sample order; with the seed they determine the result.
        seed: The user's seed.
        frame: Image preprocessing.
        scale: Minimum and maximum area fraction of a crop.
        flip: Mirror half of the images.
        late: Leave cropping to `finish`; all images must have one size.
        change: Further change of each crop; not with ``late``.

    Returns:
        ``image`` uint8 (b, channels, size, size), ``mirror`` bool (b,), and for padded images ``inside``: top, left,
        height and width in the frame. With ``late``, ``image`` is uncropped and ``crop`` has the crop boxes, int64
        (b, 4); of padded images a list, which stays on the CPU.
    """
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    boxes = crop_boxes(seed, positions, sizes[:, 0], sizes[:, 1], scale, frame.resize == "pad")
    planes = [image.permute(2, 0, 1) for image in images]
    mirror = flips(seed, positions) if flip else torch.zeros(len(images), dtype=torch.bool)
    if late:
        places = boxes.tolist() if frame.resize == "pad" else torch.from_numpy(boxes)
        return {"image": torch.stack(planes), "crop": places, "mirror": mirror}
    return {**_crops(planes, boxes.tolist(), frame, change), "mirror": mirror}


def eval_pixels(images: Sequence[Tensor], frame: Frame, late: bool) -> dict[str, Any]:
    """Resize the shorter side and crop the center (protocol 2.6), or pad the whole image; see `train_pixels`."""
    planes = [image.permute(2, 0, 1) for image in images]
    if late:
        return {"image": torch.stack(planes)}
    if frame.resize == "pad":
        return _padded(planes, frame)
    return {"image": torch.stack([_centre(plane, frame) for plane in planes])}


def finish(batch: dict[str, Any], frame: Frame) -> dict[str, Any]:
    """Crop, mirror, normalize and blend on the batch's device, as far as not done yet.

    Args:
        batch: Batch with the entries of `train_pixels` (and `Augment.mixing`) or `eval_pixels`; a float ``image`` is
            returned unchanged.
        frame: Image preprocessing.

    Returns:
        Batch with ``image`` float32 (b, 3, size, size), and with ``target`` (see `mixed`) if images are blended.
    """
    image: Tensor = batch["image"]
    if image.is_floating_point():
        return batch
    batch = dict(batch)
    boxes, mirror, mix = (batch.pop(name, None) for name in ("crop", "mirror", "mix"))
    if isinstance(boxes, Tensor) and on_cuda(image):
        batch["image"] = crop_and_resize(image, boxes, frame.size, frame.interpolation)
    elif boxes is not None:
        batch |= _crops(image, boxes.tolist() if isinstance(boxes, Tensor) else boxes, frame)
    elif image.shape[-2:] != (frame.size, frame.size):
        batch |= _padded(image, frame) if frame.resize == "pad" else {"image": _centre(image, frame)}
    inside = batch.pop("inside", None)
    batch["image"] = normalize(batch["image"], frame, mirror)
    if inside is not None:
        clear_padding(batch["image"], inside, mirror)
    return batch if mix is None else batch | mixed(batch, mix)


def eval_batch(images: Sequence[Tensor], frame: Frame) -> Tensor:
    """Run both steps of an evaluation batch: float32 (b, 3, size, size); see `eval_pixels`."""
    batch: Tensor = finish(eval_pixels(images, frame, late=False), frame)["image"]
    return batch


def _crops(
    planes: Sequence[Tensor] | Tensor, boxes: Sequence[Sequence[int]], frame: Frame, change: Change | None = None
) -> dict[str, Any]:
    """Crop and resize b uint8 (c, h, w) to ``image`` and ``inside`` (see `train_pixels`)."""
    if frame.resize == "pad":
        parts = [split_crop(p.shape[1], p.shape[2], box, frame.size) for p, box in zip(planes, boxes, strict=True)]
        return _placed(planes, parts, frame, change)
    batch = _empty((len(planes), planes[0].shape[0], frame.size, frame.size), torch.uint8, planes[0].device)
    for index, (plane, (top, left, h, w)) in enumerate(zip(planes, boxes, strict=True)):
        crop = _resize(plane[:, top : top + h, left : left + w], frame.size, frame.size, frame.interpolation)
        batch[index] = crop if change is None else change(index, crop)
    return {"image": batch}


def _padded(planes: Sequence[Tensor] | Tensor, frame: Frame) -> dict[str, Any]:
    """Pad b whole images, uint8 (c, h, w), to ``image`` and ``inside`` (see `eval_pixels`)."""
    sizes = [(plane.shape[1], plane.shape[2]) for plane in planes]
    return _placed(planes, [((0, 0, h, w), whole_box(h, w, frame.size)) for h, w in sizes], frame)


def _placed(
    planes: Sequence[Tensor] | Tensor, parts: Sequence[tuple[Box, Box]], frame: Frame, change: Change | None = None
) -> dict[str, Any]:
    """Resize parts of images, (box in it, box in the frame), into black frames; `clear_padding` colors the rest."""
    shape = len(planes), planes[0].shape[0], frame.size, frame.size
    batch = torch.zeros(shape, dtype=torch.uint8, device=planes[0].device)
    for index, (plane, (source, target)) in enumerate(zip(planes, parts, strict=True)):
        (top, left, h, w), (upper, first, tall, wide) = source, target
        part = _resize(plane[:, top : top + h, left : left + w], tall, wide, frame.interpolation)
        part = part if change is None else change(index, part)
        batch[index, :, upper : upper + tall, first : first + wide] = part
    return {"image": batch, "inside": [list(target) for _, target in parts]}


def _centre(planes: Tensor, frame: Frame) -> Tensor:
    """Resize and center-crop uint8 (..., c, h, w) to uint8 (..., c, size, size)."""
    size = frame.size
    height, width = planes.shape[-2:]
    short = min(height, width)
    h, w = size * height // short, size * width // short
    top, left = round((h - size) / 2), round((w - size) / 2)
    return _resize(planes, h, w, frame.interpolation)[..., top : top + size, left : left + size]


def _resize(planes: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    """Resize uint8 (..., c, h, w) to uint8 (..., c, height, width)."""
    resized: Tensor = v2.resize_image(planes, [height, width], InterpolationMode(interpolation), antialias=True)
    return resized


def normalize(batch: Tensor, frame: Frame, mirror: Tensor | None = None) -> Tensor:
    """Normalize uint8 (b, 1 or 3, h, w) to float32 (b, 3, h, w); mirror some, bool (b,), and repeat gray."""
    if batch.device.type != "cpu":
        if mirror is not None:
            batch = torch.where(mirror.view(-1, 1, 1, 1), batch.flip(-1), batch)
        colors = batch.to(torch.float32).expand(-1, 3, -1, -1).contiguous()
        scale, shift = _scale_and_shift_on(batch.device, frame)
        return colors.mul_(scale).sub_(shift)
    scale, shift = _scale_and_shift(frame)
    # NumPy, one image at a time: each stays in the processor's cache, and PyTorch's threads, which would wait for each
    # other among busy worker processes, stay idle.
    whole = _empty((len(batch), 3, *batch.shape[2:]), torch.float32, batch.device)
    turned = [False] * len(batch) if mirror is None else mirror.tolist()
    for pixels, colors, turn in zip(batch.numpy(), whole.numpy(), turned, strict=True):
        np.multiply(pixels[..., ::-1] if turn else pixels, scale.numpy(), out=colors)
        np.subtract(colors, shift.numpy(), out=colors)
    return whole


def _scale_and_shift(frame: Frame) -> tuple[Tensor, Tensor]:
    """Return factor and subtrahend of the colors, (3, 1, 1) each."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (frame.mean, frame.std))
    return 1 / (255 * std), mean / std


@functools.lru_cache(maxsize=64)
def _scale_and_shift_on(device: torch.device, frame: Frame) -> tuple[Tensor, Tensor]:
    """Return factor and subtrahend on a GPU, kept there: the host would wait for each copy."""
    scale, shift = _scale_and_shift(frame)
    return scale.to(device), shift.to(device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate uninitialized memory; on the CPU with NumPy, whose huge pages halve the time."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, dtype=str(dtype).removeprefix("torch.")))
