"""Training batches of images in one step."""

from collections.abc import Sequence

from torch import Tensor

from randlora_pl.data.transforms import finish, train_pixels
from randlora_pl.utils.image_spec import ImageSpec


def train_batch(
    images: Sequence[Tensor], positions: Tensor, seed: int, frame: ImageSpec, scale: tuple[float, float], flip: bool
) -> Tensor:
    """Both steps of a training batch: float32 (b, 3, size, size); see `train_pixels`."""
    batch: Tensor = finish(train_pixels(images, positions, seed, frame, scale, flip, late=False), frame)["image"]
    return batch
