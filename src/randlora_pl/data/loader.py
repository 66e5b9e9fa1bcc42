"""Numbered batches and the loader that hands them to Lightning.

Batch ``m`` is a pure function of ``m``, so that any number of workers gives the same batches, and a resumed run
goes on with batch ``m`` without reading the ones before.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from randlora_pl.data.plan import EvalSchedule, TrainSchedule
from randlora_pl.data.readers import Samples
from randlora_pl.data.transforms import Frame, eval_pixels, finish, pixels_needed, train_pixels
from randlora_pl.errors import UserError

Batch = dict[str, Any]

Late = Literal["nothing", "colours", "crops"]
"""What batches leave to `transforms.finish`: nothing, flips and normalisation, or (one size only) crops too."""

log = logging.getLogger("randlora_pl")


class Batches(Protocol):
    """Numbered batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...


def load_images(
    samples: Samples, places: Tensor, frame: Frame, scale: tuple[float, float] | None, skip: bool
) -> tuple[list[Tensor], dict[int, str]]:
    """The images of some samples.

    Args:
        samples: The split.
        places: int64 (b,), places in the split.
        frame: Size of the batch, and the mean colour, in which an image stands for an unreadable one.
        scale: Share of the area that training crops take, None for evaluation; says how many pixels are needed.
        skip: Go on after an unreadable image instead of raising.

    Returns:
        b images, uint8 (height, width, channels); and what is wrong with the unreadable ones, by place in the batch.

    Raises:
        UserError: An image is unreadable and ``skip`` is false.
    """
    images: list[Tensor] = []
    bad: dict[int, str] = {}
    short = pixels_needed(frame, scale)
    for number, row in enumerate(samples.rows[places.numpy()].tolist()):
        try:
            images.append(torch.from_numpy(samples.images.load(row, short)))
        except UserError as error:
            if not skip:
                raise
            bad[number] = f"{samples.images.name(row)}\n{error}"
            colour = torch.tensor(frame.mean).mul(255).round().to(torch.uint8)
            images.append(colour.expand(frame.size, frame.size, 3))
    return images, bad


def _without(batch: Batch, bad: dict[int, str]) -> Batch:
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
    The window's mean loss is the sum of weight x loss (see `MicroBatch`). An unreadable image that is skipped has
    weight 0; the window's other images keep theirs. What is left to do ``late`` (see `Late`) is in further entries.
    """

    samples: Samples
    schedule: TrainSchedule
    frame: Frame
    scale: tuple[float, float]
    flip: bool
    skip: bool = False
    late: Late = "nothing"

    def __len__(self) -> int:
        return len(self.schedule)

    def __getitem__(self, number: int) -> Batch:
        micro = self.schedule[number]
        plan = self.schedule.plan
        places = plan.samples(micro.draws)
        labels = torch.from_numpy(self.samples.labels)
        images, bad = load_images(self.samples, places, self.frame, self.scale, self.skip)
        classes, counts = torch.unique(labels[plan.samples(micro.window)], return_counts=True)
        batch = {
            **train_pixels(
                images, micro.draws, plan.seed, self.frame, self.scale, self.flip, late=self.late == "crops"
            ),
            "label": labels[places],
            "weight": micro.weights,
            "draw": micro.draws,
            "index": places,
            "window_classes": classes,
            "window_counts": counts,
            "micro": micro.micro,
            "micros": micro.micros,
        }
        return _without(batch if self.late != "nothing" else finish(batch, self.frame), bad)


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


def usable_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Guarded(Dataset[Batch]):
    """Hands errors over as values: a worker process would bury the message in a traceback."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Batch:
        try:
            return self.batches[number]
        except UserError as error:
            return {"error": str(error)}


def _heed_only_the_training(worker: int) -> None:
    """Has a worker end by SIGTERM only if the training sends it.

    Batch systems send it to all processes of a job, and the training needs the workers to finish its step.
    """
    training = parent_process()
    if training is None or not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen(sender: int | None) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
            pass
        os._exit(0)

    threading.Thread(target=listen, args=(training.pid,), daemon=True).start()


class Loader:
    """Iterates over numbered batches; what Lightning sees as a data loader.

    Its length is that of the whole run also when it starts later, because Lightning counts the batches before a
    resume itself. It is no `DataLoader`, so that Lightning changes nothing about it.

    Args:
        batches: The batches.
        start: Number of the first batch to give.
        num_workers: Processes that make batches; 0 makes them in this one.
        skipped: Receives the name of each image that was skipped, with the reason.
    """

    def __init__(
        self, batches: Batches, start: int = 0, num_workers: int = 0, skipped: MutableMapping[str, str] | None = None
    ) -> None:
        self.batches = batches
        self.start = start
        self.skipped: MutableMapping[str, str] = {} if skipped is None else skipped
        self._inner: DataLoader[Batch] = DataLoader(
            _Guarded(batches),
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_heed_only_the_training,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # else it draws from the global generator
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._inner:
            if "error" in batch:
                raise UserError(batch["error"])
            for line in batch.pop("bad", ()):
                name, _, reason = line.partition("\n")
                if name not in self.skipped:
                    self.skipped[name] = reason
                    log.warning("skipped the unreadable image %s (%d so far)", name, len(self.skipped))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Empty: the trainer's step is the whole state. Lightning takes its presence as `resumable`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    @property
    def _iterator(self) -> Any:
        """Lightning shuts down the workers of whatever carries this name."""
        return self._inner._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._inner._iterator = value
