"""Training and evaluation transforms: pure functions of images, seed and positions (protocol of the paper).

Images are uint8 tensors of (height, width, channels) and any size; batches are float32 (b, 3, size, size).
Evaluation resizes with Pillow, as open_clip and timm do, so that their pixels are the same. Training crops are resized
by torchvision's v2 kernel, antialiased on uint8, in a fifth of the time, mostly within two gray levels of Pillow's.

A batch is made in two steps: workers run `train_pixels` or `eval_pixels`, which return uint8 (a quarter of the bytes
to transfer), and `finish` does the rest in the worker or on the device.

RandAugment of an image depends on its own position. MixUp and CutMix blend each image of one micro-batch on one device
with its neighbor; the strength depends on the first position of the micro-batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from randlora_pl.utils import rng
from randlora_pl.utils.device import on_cuda
from randlora_pl.utils.image_spec import ImageSpec


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images in addition to the random crop and flip; disabled by default.

    Attributes:
        randaugment: Strength of RandAugment, 0 to 30; None disables it.
        mixup: Both parameters of the beta distribution of MixUp's fractions; None disables MixUp.
        cutmix: Both parameters for CutMix. With both, each micro-batch uses either with probability 1/2.
    """

    randaugment: int | None = None
    mixup: float | None = None
    cutmix: float | None = None

    def enabled(self) -> list[str]:
        """Return the enabled augmentations, one entry each."""
        pairs = (("RandAugment", self.randaugment), ("MixUp", self.mixup), ("CutMix", self.cutmix))
        return [f"{name} {value:g}" for name, value in pairs if value is not None]

    def changed(self, planes: Tensor, position: int, seed: int) -> Tensor:
        """Return an image, uint8 (1 or 3, height, width), after two random operations; `randaugment` must be set."""
        transform = v2.RandAugment(magnitude=self.randaugment, interpolation=InterpolationMode.BILINEAR)
        with rng.seeded(int(rng.words(seed, "randaugment", torch.tensor(position)))):
            after: Tensor = transform(planes)
        return after

    def mixing(self, positions: Tensor, weights: Tensor, seed: int, classes: int) -> dict[str, Any]:
        """Return the blending of a micro-batch, as the entry ``mix`` of its batch for `_mixed`; {} without blending.

        Images of weight 0 (padding or unreadable) are not blended.
        """
        choices = [("mixup", self.mixup), ("cutmix", self.cutmix)]
        choices = [(kind, alpha) for kind, alpha in choices if alpha is not None]
        if not choices:
            return {}
        kind, alpha = choices[int(rng.integers(seed, "mix", positions[0], len(choices), part=1))]
        word = int(rng.words(seed, "mix", positions[0]))
        rows = torch.nonzero(weights > 0)[:, 0].tolist()
        return {"mix": {"kind": kind, "alpha": alpha, "seed": word, "classes": classes, "rows": rows}}


PLAIN = Augment()


def _mixed(batch: dict[str, Any], mix: dict[str, Any]) -> dict[str, Tensor]:
    """Return the blended entries of a batch, on its device.

    Images keep their weights: with fractions s and 1 - s, weights u and v and labels y and z, the loss becomes
    s u CE(y) + (1 - s) v CE(z). The entry ``target`` (b, classes) float32 has class probabilities that sum to 1.
    """
    images, weights = batch["image"].clone(), batch["weight"].clone()
    targets = torch.nn.functional.one_hot(batch["label"], mix["classes"]).float()
    if mix["rows"]:
        rows = torch.tensor(mix["rows"], device=images.device)
        transform = (v2.MixUp if mix["kind"] == "mixup" else v2.CutMix)(alpha=mix["alpha"])
        with rng.seeded(mix["seed"]):
            images[rows], blended = transform(images[rows], targets[rows] * weights[rows, None])
        weights[rows] = blended.sum(1)
        targets[rows] = blended / weights[rows, None]
    return {"image": images, "weight": weights, "target": targets}


Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels; the square around an image has its longer side, with the image centered."""


def _crop_place(
    uniform: NDArray[np.float64], crop: NDArray[np.int64], image: NDArray[np.int64], square: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the start of each crop of the square along one axis, from numbers in [0, 1) and the lengths, all (b,).

    A smaller crop lies within the image, a larger one around it: no padding is shown while a part of the image is cut
    off, and no crop is empty. If image and square have the same length, crops are uniform in the square.
    """
    start = (square - image) // 2
    ends = np.stack((start, start + image - crop)).clip(0, square - crop)
    low, high = ends.min(0), ends.max(0)
    starts: NDArray[np.int64] = low + (uniform * (high - low + 1)).astype(np.int64)
    return starts


def _split_crop(height: int, width: int, crop: Sequence[int], size: int) -> tuple[Box, Box]:
    """Return the part of an image inside a crop (a box in its square), and its box in the frame."""
    top, h, upper, tall = _axis(height, max(height, width), crop[0], crop[2], size)
    left, w, first, wide = _axis(width, max(height, width), crop[1], crop[3], size)
    return (top, left, h, w), (upper, first, tall, wide)


def _axis(image: int, square: int, begin: int, length: int, size: int) -> tuple[int, int, int, int]:
    start = (square - image) // 2
    first, last = max(begin, start), min(begin + length, start + image)
    extent = max(1, round((last - first) * size / length))
    return first - start, last - first, min(round((first - begin) * size / length), size - extent), extent


Change = Callable[[int, Tensor], Tensor]
"""Further change of an image, from its index in the batch and uint8 (channels, height, width)."""

RATIO = (3 / 4, 4 / 3)
"""Aspect ratios of training crops."""

_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_ATTEMPTS = 10  # crops tried before the center crop, as torchvision's RandomResizedCrop does


def _crop_boxes(
    seed: int,
    positions: Tensor,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
    scale: tuple[float, float],
    pad: bool = False,
) -> NDArray[np.int64]:
    """Return random crop boxes: uniform area fraction, log-uniform aspect ratio in `RATIO`, uniform position.

    Up to ten (fraction, ratio) pairs are tried; if none fits, the largest centered box of an allowed ratio is used.
    With ``pad``, the square around each image is cropped instead. The result, (b, 4), has top, left, height and width;
    it is NumPy's, because PyTorch would start its thread pool for these few numbers.
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
    top = np.where(some, _crop_place(uniform[:, -2], h, tall, heights), (heights - h) // 2)
    left = np.where(some, _crop_place(uniform[:, -1], w, wide, widths), (widths - w) // 2)
    return np.stack((top, left, h, w), 1)


def pixels_needed(frame: ImageSpec, scale: tuple[float, float] | None) -> int:
    """Return the minimum shorter side in pixels to which `Images.load` may shrink an image.

    In training, no crop gets fewer pixels than the frame. In evaluation, where metrics are compared with published
    ones, resizing still at least halves the image, so that the decoder's own filter has almost no effect. A padded
    image would need fewer: its longer side fills the frame. ``scale`` is None in evaluation.
    """
    return 2 * frame.length if scale is None else math.ceil(frame.size / math.sqrt(scale[0] * RATIO[0]))


def train_pixels(
    images: Sequence[Tensor],
    positions: Tensor,
    seed: int,
    frame: ImageSpec,
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
        ``image`` uint8 (b, channels, size, size), and ``mirror`` bool (b,). With ``late``, ``image`` is uncropped and
        ``crop`` has the crop boxes, int64 (b, 4); of padded images a list, which stays on the CPU.
    """
    sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
    boxes = _crop_boxes(seed, positions, sizes[:, 0], sizes[:, 1], scale, frame.resize == "longest")
    planes = [image.permute(2, 0, 1) for image in images]
    mirror = rng.words(seed, "flip", positions) < 2**31 if flip else torch.zeros(len(images), dtype=torch.bool)
    if late:
        places = boxes.tolist() if frame.resize == "longest" else torch.from_numpy(boxes)
        return {"image": torch.stack(planes), "crop": places, "mirror": mirror}
    return {"image": _crops(planes, boxes.tolist(), frame, change), "mirror": mirror}


def eval_pixels(images: Sequence[Tensor], frame: ImageSpec) -> Tensor:
    """Resize, crop and fill whole images with Pillow, as `ImageSpec.steps` describes: uint8 (b, channels, size, size).

    Args:
        images: b images, uint8 (height, width, 1 or 3), all with the same number of channels.
        frame: Image preprocessing.
    """
    batch = _filled(len(images), images[0].shape[2], frame, images[0].device)
    for index, image in enumerate(images):
        height, width = image.shape[:2]
        tall, wide = frame.resized(height, width)
        (upper, first, h), (left, start, w) = _window(tall, frame.size), _window(wide, frame.size)
        whole, kernel = Image.fromarray(image.squeeze(2).numpy()), _PILLOW[frame.interpolation]
        if tall * wide <= 64 * frame.size**2:
            part = whole.resize((wide, tall), kernel).crop((left, upper, left + w, upper + h))
        else:  # the whole could take gigabytes; gray levels differ by at most one
            x0, x1 = left * width / wide, (left + w) * width / wide
            y0, y1 = upper * height / tall, (upper + h) * height / tall
            if tall > height:  # Pillow enlarges along rows first, but would shrink a part along columns first
                whole, x0, x1 = whole.resize((w, height), kernel, (x0, 0, x1, height)), 0, w
            part = whole.resize((w, h), kernel, (x0, y0, x1, y1))
        pixels = torch.from_numpy(np.array(part).reshape(h, w, -1))
        batch[index, :, first : first + h, start : start + w] = pixels.permute(2, 0, 1)
    return batch


def _window(resized: int, size: int) -> tuple[int, int, int]:
    """Return the start of the shown part of a resized image along one axis, its start in the frame, and its length.

    The image is cropped or filled around its center, with torchvision's rounding.
    """
    if resized <= size:
        return 0, (size - resized) // 2, resized
    return round((resized - size) / 2), 0, size


def finish(batch: dict[str, Any], frame: ImageSpec) -> dict[str, Any]:
    """Crop, mirror, normalize and blend on the batch's device, as far as not done yet.

    Args:
        batch: Batch with the entries of `train_pixels` (and `Augment.mixing`), or with the ``image`` of `eval_pixels`;
            a float ``image`` is returned unchanged.
        frame: Image preprocessing.

    Returns:
        Batch with ``image`` float32 (b, 3, size, size), and with ``target`` (see `_mixed`) if images are blended.
    """
    image: Tensor = batch["image"]
    if image.is_floating_point():
        return batch
    batch = dict(batch)
    boxes, mirror, mix = (batch.pop(name, None) for name in ("crop", "mirror", "mix"))
    if isinstance(boxes, Tensor) and on_cuda(image):
        batch["image"] = _crop_and_resize(image, boxes, frame.size, frame.interpolation)
    elif boxes is not None:
        batch["image"] = _crops(image, boxes.tolist() if isinstance(boxes, Tensor) else boxes, frame)
    batch["image"] = normalize(batch["image"], frame, mirror)
    return batch if mix is None else batch | _mixed(batch, mix)


def eval_batch(images: Sequence[Tensor], frame: ImageSpec) -> Tensor:
    """Run both steps of an evaluation batch: float32 (b, 3, size, size); see `eval_pixels`."""
    return normalize(eval_pixels(images, frame), frame)


def _crops(
    planes: Sequence[Tensor] | Tensor, boxes: Sequence[Sequence[int]], frame: ImageSpec, change: Change | None = None
) -> Tensor:
    """Crop and resize b uint8 (c, h, w) to (b, c, size, size); crops of a padded image lie in the square around it."""
    batch = _filled(len(planes), planes[0].shape[0], frame, planes[0].device)
    whole = 0, 0, frame.size, frame.size
    for index, (plane, box) in enumerate(zip(planes, boxes, strict=True)):
        part, place = box, whole
        if frame.resize == "longest":
            part, place = _split_crop(plane.shape[1], plane.shape[2], box, frame.size)
        (top, left, h, w), (upper, first, tall, wide) = part, place
        kernel = InterpolationMode(frame.interpolation)
        crop: Tensor = v2.functional.resize_image(
            plane[:, top : top + h, left : left + w], [tall, wide], kernel, antialias=True
        )
        crop = crop if change is None else change(index, crop)
        batch[index, :, upper : upper + tall, first : first + wide] = crop
    return batch


def _filled(count: int, channels: int, frame: ImageSpec, device: torch.device) -> Tensor:
    """Return uint8 (count, channels, size, size) of the color that fills a frame; 3 channels if it is not gray."""
    channels = 3 if len(set(frame.fill)) > 1 else channels
    batch = _empty((count, channels, frame.size, frame.size), torch.uint8, device)
    if any(frame.fill):
        return batch.copy_(torch.tensor(frame.fill[:channels], device=device).view(-1, 1, 1))
    return batch.zero_()


def normalize(batch: Tensor, frame: ImageSpec, mirror: Tensor | None = None) -> Tensor:
    """Normalize uint8 (b, 1 or 3, h, w) to float32 (b, 3, h, w); mirror some, bool (b,), and repeat gray."""
    scale, shift = _scale_and_shift(batch.device, frame)
    if batch.device.type != "cpu":
        if mirror is not None:
            batch = torch.where(mirror.view(-1, 1, 1, 1), batch.flip(-1), batch)
        colors = batch.to(torch.float32).expand(-1, 3, -1, -1).contiguous()
        return colors.mul_(scale).sub_(shift)
    # NumPy, one image at a time: each stays in the processor's cache, and PyTorch's threads, which would wait for each
    # other among busy worker processes, stay idle.
    whole = _empty((len(batch), 3, *batch.shape[2:]), torch.float32, batch.device)
    turned = [False] * len(batch) if mirror is None else mirror.tolist()
    for pixels, colors, turn in zip(batch.numpy(), whole.numpy(), turned, strict=True):
        np.multiply(pixels[..., ::-1] if turn else pixels, scale.numpy(), out=colors)
        np.subtract(colors, shift.numpy(), out=colors)
    return whole


@functools.lru_cache(maxsize=64)
def _scale_and_shift(device: torch.device, frame: ImageSpec) -> tuple[Tensor, Tensor]:
    """Return factor and subtrahend, kept on a GPU because the host would wait for each copy."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (frame.mean, frame.std))
    scale, shift = 1 / (255 * std), mean / std
    return scale.to(device), shift.to(device)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate uninitialized memory; on the CPU with NumPy, whose huge pages halve the time."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, dtype=str(dtype).removeprefix("torch.")))


_AT_ONCE = 1 << 26
"""Largest number of float32 values per temporary tensor: 256 MB."""


def _crop_and_resize(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Crop each image and resize the crop, with antialiasing: about 40 kernels, whatever the size of the batch.

    Rows and then columns are interpolated by one matrix each per image, in float32, and rounded to gray levels in
    between, as torchvision does with uint8 images on a CPU. Its coefficients have 16 bits, so the results differ by at
    most 2 gray levels. Images are uint8 (b, c, h, w), and boxes (top, left, height, width) are on their device.
    """
    height, width = images.shape[-2:]
    weights = _resize_weights(boxes, max(height, width), size, interpolation)
    rows, columns = weights[0, :, None, :, :height], weights[1, :, :, :width].mT
    channels = images.shape[1]
    some = max(1, _AT_ONCE // max(1, images[0].numel(), channels * size * max(size, height)))
    done = []
    for part, row, column in zip(*(torch.split(each, some) for each in (images, rows, columns)), strict=True):
        narrow = part.reshape(-1, channels * height, width).float() @ column
        narrow = narrow.add_(0.5).clamp_(0, 255).floor_()  # halves upwards
        done.append((row @ narrow.view(-1, channels, height, size)).add_(0.5).clamp_(0, 255).to(torch.uint8))
    return done[0] if len(done) == 1 else torch.cat(done)


def _resize_weights(boxes: Tensor, length: int, size: int, interpolation: str) -> Tensor:
    """Return matrices that crop and resize columns and rows of pixels: float32 (2, b, size, length), for both sides.

    Each row sums to 1. ``length`` is at least the number of pixels before the crop, ``size`` the number after it.
    """
    starts, lengths = boxes.T.reshape(2, 2, -1, 1, 1).float()
    scale = lengths / size
    centers = scale * (torch.arange(size, device=boxes.device)[:, None] + 0.5)
    places = torch.arange(length, device=boxes.device) + 0.5 - starts  # of the pixels in the crop
    distance = (places - centers).abs_().div_(scale.clamp(min=1))
    if interpolation == "bicubic":
        # cubic convolution with a = -0.5 (Keys 1981), as in Pillow and PyTorch: with u = max(0, 2 - distance) and
        # v = max(0, 1 - distance) it is u^2 (u - 1) / 2 + v^2 (1 - 2 v)
        u, v = (2 - distance).clamp_(min=0), (1 - distance).clamp_(min=0)
        weights = (u - 1).mul_(u).mul_(u).div_(2).addcmul_(v * v, 1 - 2 * v)
    else:
        weights = (1 - distance).clamp_(min=0)
    weights *= (places > 0) & (places < lengths)
    result: Tensor = weights.div_(weights.sum(-1, keepdim=True))
    return result
