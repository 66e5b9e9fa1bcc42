"""Zero-shot accuracy of CLIP."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode()
def zero_shot_accuracy(
    model: Any, heads: Tensor, batches: Iterable[tuple[Tensor, Tensor]], tick: Callable[[int], None] = lambda _: None
) -> tuple[list[float], int]:
    """Return the zero-shot accuracy in percent of each head, and the number of images.

    Args:
        model: Model with ``encode_image``.
        heads: Embeddings of the classes (heads, C, e), of unit length.
        batches: Images (b, 3, H, W) with labels (b,).
        tick: Receives the number of images of each batch.
    """
    right, count = torch.zeros(len(heads), dtype=torch.int64), 0
    for images, labels in batches:
        features = F.normalize(model.encode_image(images).float(), dim=-1)
        right += ((features @ heads.transpose(1, 2)).argmax(2) == labels).sum(1).cpu()
        count += len(labels)
        tick(len(labels))
    return [100 * number / max(1, count) for number in right.tolist()], count
