"""Crops of a batch of images, resized by two batched products instead of a loop over the images."""

import torch
from torch import Tensor

_AT_ONCE = 1 << 26
"""Largest number of float32 values per temporary tensor: 256 MB."""


def crop_and_resize(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Crop each image and resize the crop, with antialiasing: about 40 kernels, whatever the size of the batch.

    Rows and then columns are interpolated by one matrix each per image, in float32, and rounded to gray levels in
    between, as torchvision does with uint8 images on a CPU. Its coefficients have 16 bits, so the results differ by at
    most 2 gray levels.

    Args:
        images: uint8 (b, c, h, w).
        boxes: (b, 4): top, left, height and width, on the device of the images.
        size: Height and width of the results.
        interpolation: ``bicubic`` or ``bilinear``.

    Returns:
        uint8 (b, c, size, size).
    """
    height, width = images.shape[-2:]
    weights = resize_weights(boxes, max(height, width), size, interpolation)
    rows, columns = weights[0, :, None, :, :height], weights[1, :, :, :width].mT
    channels = images.shape[1]
    some = max(1, _AT_ONCE // max(1, images[0].numel(), channels * size * max(size, height)))
    done = []
    for part, row, column in zip(*(torch.split(each, some) for each in (images, rows, columns)), strict=True):
        narrow = part.reshape(-1, channels * height, width).float() @ column
        narrow = narrow.add_(0.5).clamp_(0, 255).floor_()  # halves upwards
        done.append((row @ narrow.view(-1, channels, height, size)).add_(0.5).clamp_(0, 255).to(torch.uint8))
    return done[0] if len(done) == 1 else torch.cat(done)


def resize_weights(boxes: Tensor, length: int, size: int, interpolation: str) -> Tensor:
    """Compute the matrices that crop and resize columns and rows of pixels.

    Args:
        boxes: (b, 4): top, left, height and width.
        length: Number of pixels before the crop, at least as many as the image has.
        size: Number of pixels after it.
        interpolation: ``bicubic`` or ``bilinear``.

    Returns:
        float32 (2, b, size, length), for height and width; each row sums to 1.
    """
    starts, lengths = boxes.T.reshape(2, 2, -1, 1, 1).float()
    scale = lengths / size
    centers = scale * (torch.arange(size, device=boxes.device)[:, None] + 0.5)
    places = torch.arange(length, device=boxes.device) + 0.5 - starts  # of the pixels in the crop
    distance = (places - centers).abs_().div_(scale.clamp(min=1))
    weights = _cubic(distance) if interpolation == "bicubic" else (1 - distance).clamp_(min=0)
    weights *= (places > 0) & (places < lengths)
    result: Tensor = weights.div_(weights.sum(-1, keepdim=True))
    return result


def _cubic(x: Tensor) -> Tensor:
    """Compute the cubic convolution kernel with a = -0.5 (Keys 1981), as Pillow and PyTorch do, for x of 0 and more.

    With u = max(0, 2 - x) and v = max(0, 1 - x) it is u^2 (u - 1) / 2 + v^2 (1 - 2 v).
    """
    u, v = (2 - x).clamp_(min=0), (1 - x).clamp_(min=0)
    return (u - 1).mul_(u).mul_(u).div_(2).addcmul_(v * v, 1 - 2 * v)
