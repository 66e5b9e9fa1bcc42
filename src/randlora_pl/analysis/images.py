"""A fixed choice of a data set's images, the same for every model that is looked at."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from randlora_pl.data import ImageData
from randlora_pl.data.images.decode import ArrayImages
from randlora_pl.data.loading.image_batches import EvalBatches, default_workers
from randlora_pl.data.loading.loader import Loader
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.sampling.schedule import EvalSchedule
from randlora_pl.data.sampling.splits import stratified
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError


def share_of(samples: Samples, share: float, seed: int) -> Samples:
    """A share of some samples, each class in proportion, by the seed and the samples' keys alone; at least one."""
    total = max(1, round(share * len(samples)))
    return samples.subset(stratified(samples.labels, samples.numbers, total, seed, "analysis"))


def some_of(samples: Samples, count: int | None, seed: int) -> Samples:
    """So many samples in a random order, or all of them."""
    order = rng.permutation(seed, "analysis/order", len(samples)).numpy()
    return samples.subset(order if count is None else np.asarray(order[:count]))


def batches(
    data: ImageData, samples: Samples, size: int, device: torch.device | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (b, 3, H, W) as for a test, and labels (b,), in batches of nearly equal size.

    Args:
        data: The data set, after ``setup``.
        samples: Samples of it.
        size: The most images of a batch.
        device: Where they go.

    Raises:
        UserError: There are none, or an image cannot be read.
    """
    if not len(samples):
        raise UserError(f"{data.row.title}: there are no images of this kind.")
    size = -(-len(samples) // -(-len(samples) // size))
    numbered = EvalBatches(samples, EvalSchedule(len(samples), size), data.frame, data.skip)
    workers = default_workers(isinstance(samples.images, ArrayImages), data.frame, 1)
    for batch in Loader(numbered, 0, workers, data.skipped):
        good = batch["weight"] > 0
        yield batch["image"][good].to(device), batch["label"][good].to(device)


def classes_of(data: ImageData, classnames: list[str]) -> None:
    """Refuses data whose classes are not those of a model.

    Raises:
        UserError: They differ, or are captions.
    """
    if data.row.captions:
        raise UserError(f"{data.row.name}: captions are no classes; name a data set with classes: --dataset NAME")
    if data.classnames != classnames:
        raise UserError(
            f"{data.row.name} has {len(data.classnames)} classes {data.classnames[:3]}..., the model was trained on "
            f"{len(classnames)} others {classnames[:3]}...; name its own data set: --dataset NAME"
        )
