"""Numbered batches of images for training and evaluation."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.data.loader import Batch
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.schedule import EvalSchedule, TrainSchedule
from randlora_pl.data.transforms import PLAIN, Augment, eval_pixels, finish, pixels_needed, train_pixels
from randlora_pl.utils.errors import UnreadableImageError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.machine import usable_cores

Late = Literal["nothing", "colors", "crops"]
"""Steps left to `transforms.finish`: none, flips and normalization, or (training, one size only) crops as well."""


def load_images(
    samples: Samples, indices: Tensor, frame: ImageSpec, scale: tuple[float, float] | None, skip: bool
) -> tuple[list[Tensor], dict[int, tuple[str, str]]]:
    """Load the images of some samples.

    Args:
        samples: Samples of a split.
        indices: int64 (b,), indices in the split.
        frame: Image preprocessing.
        scale: Minimum and maximum area fraction of a training crop; None in evaluation.
        skip: Skip unreadable images.

    Returns:
        b images, uint8 (height, width, channels), the mean color for unreadable ones; and (name, error) of these by
        index in the batch.

    Raises:
        UserError: An image is unreadable and ``skip`` is false, or the machine or the storage fails.
    """
    images: list[Tensor] = []
    bad: dict[int, tuple[str, str]] = {}
    short = pixels_needed(frame, scale)
    for number, row in enumerate(samples.rows[indices.numpy()].tolist()):
        try:
            images.append(torch.from_numpy(samples.images.load(row, short)))
        except UnreadableImageError as error:  # not of a lost shard, or of memory that ran out
            if not skip:
                raise
            bad[number] = (samples.images.name(row), str(error))
            colour = torch.tensor(frame.mean).mul(255).round().to(torch.uint8)
            images.append(colour.expand(frame.size, frame.size, 3))
    return images, bad


def _without(batch: Batch, bad: dict[int, tuple[str, str]]) -> Batch:
    """Set the weight of unreadable images to 0; `Loader` counts them."""
    if bad:
        batch["weight"][list(bad)] = 0.0
        batch["bad"] = list(bad.values())
    return batch


def counted_classes(labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes of a single micro-batch, and their counts.

    A class of padding alone has count 0 and adds nothing to any loss. If all is padding, all of it counts: the
    losses have weight 0 then, but every parameter must get a gradient.

    Args:
        labels: int64 (b,), classes of the images.
        counted: bool (b,), True for samples that are not padding.

    Returns:
        Sorted classes (u,) and their counts (u,), int64.
    """
    classes, indices = torch.unique(labels, return_inverse=True)
    counts = F.one_hot(indices, len(classes))[counted | ~counted.any()].sum(0)
    return classes, counts


@dataclass(frozen=True)
class TrainBatches:
    """Training batches of one rank: one dictionary per micro-batch.

    ``image`` (b, 3, H, W) float32, ``label`` (b,) int64, ``weight`` (b,) float32, ``position`` (b,) int64, ``index``
    (b,) int64 index in the split, ``step_classes`` and ``step_counts`` (u,) int64: sorted labels of the whole
    optimizer step and their counts, ``own_classes`` and ``own_counts``: the same for the micro-batch alone (see
    `counted_classes`), ``micro_batch`` and ``micro_batches``: index and number of its micro-batches.
    The mean loss of an optimizer step is the sum of weight x loss (see `MicroBatch`); weights include
    ``class_weights``. A skipped unreadable image has weight 0; other weights do not change. Steps left (see `Late`)
    are in further entries. If images are blended, ``target`` (b, classes) float32 has their labels.
    """

    samples: Samples
    schedule: TrainSchedule
    frame: ImageSpec
    scale: tuple[float, float]
    flip: bool
    skip: bool = False
    late: Late = "nothing"
    class_weights: Tensor | None = None
    augment: Augment = PLAIN
    classes: int = 0

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        micro_batch = self.schedule[number]
        plan = self.schedule.plan
        indices = plan.samples(micro_batch.positions)
        labels = torch.from_numpy(self.samples.labels)
        images, bad = load_images(self.samples, indices, self.frame, self.scale, self.skip)
        classes, counts = torch.unique(labels[plan.samples(micro_batch.step_positions)], return_counts=True)
        late, change = self.late == "crops", None
        if self.augment.randaugment is not None:
            change = lambda index, crop: self.augment.changed(crop, int(micro_batch.positions[index]), plan.seed)  # noqa: E731
        batch = {
            **train_pixels(images, micro_batch.positions, plan.seed, self.frame, self.scale, self.flip, late, change),
            "label": labels[indices],
            **micro_batch.entries(indices, labels[indices], self.class_weights),
            "step_classes": classes,
            "step_counts": counts,
        }
        batch = _without(batch, bad)
        batch["own_classes"], batch["own_counts"] = counted_classes(batch["label"], batch["weight"] > 0)
        batch |= self.augment.mixing(micro_batch.positions, batch["weight"], plan.seed, self.classes)
        return batch if self.late != "nothing" else finish(batch, self.frame)


@dataclass(frozen=True)
class EvalBatches:
    """Evaluation batches of one rank: ``image``, ``label``, ``weight`` (0 for padding and skipped), ``index``.

    A further entry, ``whole``, is True if no weight is 0, so that a GPU need not be asked.
    """

    samples: Samples
    schedule: EvalSchedule
    frame: ImageSpec
    skip: bool = False
    late: Late = "nothing"

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        indices, weights = self.schedule[number]
        images, bad = load_images(self.samples, indices, self.frame, None, self.skip)
        batch = {
            "image": eval_pixels(images, self.frame),
            "label": torch.from_numpy(self.samples.labels)[indices],
            "weight": weights,
            "index": indices,
        }
        batch = _without(batch if self.late != "nothing" else finish(batch, self.frame), bad)
        return {**batch, "whole": bool((batch["weight"] > 0).all())}


def default_workers(in_memory: bool, frame: ImageSpec, devices: int) -> int:
    """Return the worker processes per device: 0 if images in memory make cheap batches, else its part of the cores."""
    if in_memory and (frame.size <= 64 or not torch.cuda.is_available()):
        return 0
    if torch.cuda.is_available():  # a core decodes 150 to 300 photographs a second, a GPU trains on thousands
        workers = (usable_cores() - 1) // max(1, devices)
        return min(32, max(1, workers))  # each holds two batches in shared memory
    return min(8, usable_cores() // max(1, devices))
