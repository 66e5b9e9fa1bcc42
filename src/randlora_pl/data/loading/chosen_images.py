"""A random choice of a dataset's images, identical for all models, in batches with the test preprocessing."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from randlora_pl.data.images.sources import ArrayImages
from randlora_pl.data.loading.image_batches import EvalBatches, default_workers
from randlora_pl.data.loading.loader import Loader
from randlora_pl.data.module import ImageData
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.sampling.schedule import EvalSchedule
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec


def framed(options: dict[str, Any], frame: ImageSpec, batch: int) -> ImageData:
    """Return data with the preprocessing of a frame, for one pass over its images."""
    data = ImageData(**options, eval_batch_size=batch, cache_images=False)
    data.spec = frame
    return data


def random_samples(samples: Samples, count: int | None, seed: int) -> Samples:
    """Return this many samples, or all, in random order."""
    order = rng.permutation(seed, "analysis/order", len(samples)).numpy()
    return samples.subset(order if count is None else np.asarray(order[:count]))


def batches(
    data: ImageData, samples: Samples, size: int, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images (b, 3, H, W) with test preprocessing and labels (b,), in batches of nearly equal size.

    Raises:
        UserError: The samples are empty, or an image cannot be read.
    """
    if not len(samples):
        raise UserError(f"{data.row.title} has no images of this kind.")
    size = -(-len(samples) // -(-len(samples) // size))
    numbered = EvalBatches(samples, EvalSchedule(len(samples), size), data.frame, data.skip)
    workers = default_workers(isinstance(samples.images, ArrayImages), data.frame, 1)
    for batch in Loader(numbered, 0, workers, data.skipped):
        good = batch["weight"] > 0
        yield batch["image"][good].to(device), batch["label"][good].to(device)
