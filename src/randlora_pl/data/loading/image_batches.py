"""Numbered batches of images: what a `Loader` hands over for training and for evaluation."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from randlora_pl.data.images.augment import PLAIN, Augment
from randlora_pl.data.images.frame import Frame
from randlora_pl.data.images.transforms import eval_pixels, finish, pixels_needed, train_pixels
from randlora_pl.data.loading.loader import Batch
from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.sampling.schedule import EvalSchedule, TrainSchedule
from randlora_pl.utils.cores import usable_cores
from randlora_pl.utils.errors import UserError

Late = Literal["nothing", "colours", "crops"]
"""What batches leave to `transforms.finish`: nothing, flips and normalisation, or (one size only) crops too."""


def load_images(
    samples: Samples, places: Tensor, frame: Frame, scale: tuple[float, float] | None, skip: bool
) -> tuple[list[Tensor], dict[int, tuple[str, str]]]:
    """The images of some samples.

    Args:
        samples: The split.
        places: int64 (b,), places in the split.
        frame: Size of the batch, and the mean colour, in which an image stands for an unreadable one.
        scale: Share of the area that training crops take, None for evaluation; says how many pixels are needed.
        skip: Go on after an unreadable image instead of raising.

    Returns:
        b images, uint8 (height, width, channels); and (name, error) of the unreadable ones, by place in the batch.

    Raises:
        UserError: An image is unreadable and ``skip`` is false.
    """
    images: list[Tensor] = []
    bad: dict[int, tuple[str, str]] = {}
    short = pixels_needed(frame, scale)
    for number, row in enumerate(samples.rows[places.numpy()].tolist()):
        try:
            images.append(torch.from_numpy(samples.images.load(row, short)))
        except UserError as error:
            if not skip:
                raise
            bad[number] = (samples.images.name(row), str(error))
            colour = torch.tensor(frame.mean).mul(255).round().to(torch.uint8)
            images.append(colour.expand(frame.size, frame.size, 3))
    return images, bad


def _without(batch: Batch, bad: dict[int, tuple[str, str]]) -> Batch:
    """Gives unreadable images weight 0; `Loader` counts them."""
    if bad:
        batch["weight"][list(bad)] = 0.0
        batch["bad"] = list(bad.values())
    return batch


@dataclass(frozen=True)
class TrainBatches:
    """Training batches of one rank: a dictionary for each micro-batch.

    ``image`` (b, 3, H, W) float32, ``label`` (b,) int64, ``weight`` (b,) float32, ``draw`` (b,) int64, ``index``
    (b,) int64 place in the split, ``window_classes`` and ``window_counts`` (u,) int64: sorted labels of the whole
    window and how often each is in it, ``micro`` and ``micros``: place in the window and micro-batches of it.
    The window's mean loss is the sum of weight x loss (see `MicroBatch`); ``class_weights`` are in the weights. An
    unreadable image that is skipped has weight 0; the window's other images keep theirs. What is left to do ``late``
    (see `Late`) is in further entries. Where images are blended, ``target`` (b, classes) float32 holds their labels.
    """

    samples: Samples
    schedule: TrainSchedule
    frame: Frame
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
        micro = self.schedule[number]
        plan = self.schedule.plan
        places = plan.samples(micro.draws)
        labels = torch.from_numpy(self.samples.labels)
        images, bad = load_images(self.samples, places, self.frame, self.scale, self.skip)
        classes, counts = torch.unique(labels[plan.samples(micro.window)], return_counts=True)
        late, change = self.late == "crops", None
        if self.augment.randaugment is not None:
            change = lambda place, crop: self.augment.changed(crop, int(micro.draws[place]), plan.seed)  # noqa: E731
        batch = {
            **train_pixels(images, micro.draws, plan.seed, self.frame, self.scale, self.flip, late, change),
            "label": labels[places],
            "weight": micro.weighted(labels[places], self.class_weights),
            "draw": micro.draws,
            "index": places,
            "window_classes": classes,
            "window_counts": counts,
            "micro": micro.micro,
            "micros": micro.micros,
        }
        batch = _without(batch, bad)
        batch |= self.augment.mixing(micro.draws, batch["weight"], plan.seed, self.classes)
        return batch if self.late != "nothing" else finish(batch, self.frame)


@dataclass(frozen=True)
class EvalBatches:
    """Evaluation batches of one rank: ``image``, ``label``, ``weight`` (0 for padding and skipped), ``index``."""

    samples: Samples
    schedule: EvalSchedule
    frame: Frame
    skip: bool = False
    late: Late = "nothing"

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        places, weights = self.schedule[number]
        images, bad = load_images(self.samples, places, self.frame, None, self.skip)
        batch = {
            **eval_pixels(images, self.frame, late=self.late == "crops"),
            "label": torch.from_numpy(self.samples.labels)[places],
            "weight": weights,
            "index": places,
        }
        return _without(batch if self.late != "nothing" else finish(batch, self.frame), bad)


def default_workers(in_memory: bool, frame: Frame, devices: int) -> int:
    """Processes that prepare batches for one device: none where that is little work, else its share of the cores.

    Args:
        in_memory: Whether images need no decoding.
        frame: How large they become.
        devices: How many devices of this machine train.
    """
    if in_memory and (frame.size <= 64 or not torch.cuda.is_available()):
        return 0
    return min(8, usable_cores() // max(1, devices))
