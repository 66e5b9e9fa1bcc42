"""Selection of a dataset's images, identical for all models of an analysis."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from randlora_pl.data import ImageData
from randlora_pl.data.images.sources import ArrayImages
from randlora_pl.data.loading.image_batches import EvalBatches, default_workers
from randlora_pl.data.loading.loader import Loader
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.sampling.schedule import EvalSchedule
from randlora_pl.data.sampling.splits import stratified
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError


def stratified_fraction(samples: Samples, fraction: float, seed: int) -> Samples:
    """Return a stratified fraction of the samples, at least one; only seed and sample keys decide."""
    total = max(1, round(fraction * len(samples)))
    return samples.subset(stratified(samples.labels, samples.numbers, total, seed, "analysis"))


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


def check_classes(data: ImageData, classnames: list[str]) -> None:
    """Raise a `UserError` if the data has captions, or other classes than the model."""
    if data.row.captions:
        raise UserError(f"{data.row.name} has captions, not classes. Set a dataset with classes: --dataset NAME")
    if data.classnames != classnames:
        raise UserError(
            f"{data.row.name} has {len(data.classnames)} classes ({data.classnames[:3]} ...), but the model has "
            f"{len(classnames)} others ({classnames[:3]} ...). Set its dataset: --dataset NAME"
        )
