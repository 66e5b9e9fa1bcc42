"""Sample order of a run, and the loader of its numbered batches for Lightning.

Training is one loop over the positions of the order, which is a pure function of (seed, position). The global batch of
one optimizer step is split into micro-batches for gradient accumulation and for the ranks of a distributed run. Classes
of different sizes may be drawn equally often, or weigh the losses. Batch ``m`` is a pure function of ``m``, so that any
number of workers gives the same batches, and a resumed run continues with batch ``m`` without reading earlier ones.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError, log

Batch = dict[str, Any]


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """Return the weight of each class, float32 (classes,): inverse to its frequency, with mean 1 over the samples.

    Classes without samples have weight 0.
    """
    counts = torch.bincount(labels, minlength=classes)
    scale = len(labels) / (counts > 0).sum()
    return torch.where(counts > 0, scale / counts.clamp(min=1), 0.0).float()


@lru_cache(maxsize=4096)
def _order(seed: int, label: int, size: int, epoch: int) -> Tensor:
    """Return the sample order of one class; cached, because a run needs few classes and epochs at a time."""
    return rng.permutation(seed, f"order of class {label}", size, part=epoch)


@dataclass(frozen=True)
class ClassDraws:
    """A sample order that selects every class with samples equally often.

    Attributes:
        indices: int64 (samples,), sample indices grouped by class.
        starts: int64 (classes,), start of each class in ``indices``; classes without samples are omitted.
        counts: int64 (classes,), number of samples per class.
    """

    indices: Tensor
    starts: Tensor
    counts: Tensor

    @classmethod
    def from_labels(cls, labels: Tensor) -> "ClassDraws":
        """Group samples by class."""
        counts = torch.unique(labels, return_counts=True)[1]
        return cls(torch.argsort(labels, stable=True), counts.cumsum(0) - counts, counts)

    def samples(self, seed: int, positions: Tensor, sampling: str) -> Tensor:
        """Return the sample at each position, a pure function of the seed and the position.

        Args:
            seed: Seed of the order.
            positions: int64 positions in the sample order, of any shape.
            sampling: ``with_replacement``: each position selects a random class and a random sample of it. ``epochs``:
                all classes take turns, in a new order each round; a class's samples are used up before any is repeated.
        """
        if sampling == "with_replacement":
            labels = rng.integers(seed, "class", positions, len(self.counts))
            chosen = (rng.words(seed, "order", positions) * self.counts[labels]) >> 32
            return self.indices[self.starts[labels] + chosen]
        rounds = torch.div(positions, len(self.counts), rounding_mode="floor")
        samples = torch.empty_like(positions)
        for number in torch.unique(rounds).tolist():
            here = rounds == number
            turns = rng.permutation(seed, "class", len(self.counts), part=number)
            drawn = []
            for label in turns[positions[here] % len(self.counts)].tolist():
                size = int(self.counts[label])
                epoch, turn = divmod(number, size)  # a class is drawn once in each round
                drawn.append(int(self.indices[self.starts[label] + _order(seed, label, size, epoch)[turn]]))
            samples[here] = torch.tensor(drawn)
        return samples


def remarks(
    labels: Mapping[str, NDArray[np.int64]], names: Sequence[str], unit: str = "images", balanced: bool = False
) -> list[str]:
    """Return one line about classes missing in splits, and one about training classes that differ 10 times in size.

    ``labels`` has the class of each sample, by split; empty splits are ignored. ``balanced`` training corrects for
    different sizes.
    """
    counts = {split: np.bincount(numbers, minlength=len(names)) for split, numbers in labels.items() if len(numbers)}
    lines = []
    if lacking := {split: np.flatnonzero(count == 0) for split, count in counts.items() if (count == 0).any()}:
        parts = ", ".join(f"{len(empty)} in {split}" for split, empty in lacking.items())
        first = names[int(next(iter(lacking.values()))[0])]
        unseen = "; validation measures only the classes that val has" if "val" in lacking else ""
        lines.append(
            f"classes without {unit}: {parts} (of {len(names)} classes; the first: {first!r}){unseen}; add {unit}"
        )
    train = counts.get("train", np.zeros(0, dtype=np.int64))
    some = np.flatnonzero(train)
    if not balanced and len(some) and train[some].max() >= 10 * train[some].min():
        low, high = int(some[train[some].argmin()]), int(train.argmax())
        sizes = f"{names[high]!r} has {train[high]:,} training {unit}, {names[low]!r} {train[low]:,}"
        lines.append(f"classes differ in size: {sizes}; accuracy favors the large ones, see --data.balance weights")
    return lines


@lru_cache(maxsize=6)
def _epoch_order(seed: int, stream: str, size: int, epoch: int) -> Tensor:
    return rng.permutation(seed, stream, size, part=epoch)


@dataclass(frozen=True)
class DrawPlan:
    """Sample order of a training run.

    Examples:
        >>> plan = DrawPlan(num_samples=100, samples_drawn=250, global_batch=32, sampling="epochs")
        >>> plan.steps, len(plan.samples(plan.step_positions(0)))
        (8, 32)

    Attributes:
        num_samples: Number of training samples.
        samples_drawn: Number of samples that the whole run draws, repeats included.
        global_batch: Samples per optimizer step (batch size x accumulation x ranks); the last step may have fewer.
        seed: Seed of the order.
        sampling: ``with_replacement`` (the paper: uniform, independent draws) or ``epochs`` (a new order of all samples
            in each pass).
        classes: Draws every class equally often; None draws every sample equally often.
        chosen: int64 (num_samples,), indices of the samples that are drawn if they are a part of all; None for all.
        stream: Name of the random stream.
    """

    num_samples: int
    samples_drawn: int
    global_batch: int
    seed: int = 0
    sampling: str = "with_replacement"
    classes: ClassDraws | None = field(default=None, compare=False, repr=False)
    chosen: Tensor | None = field(default=None, compare=False, repr=False)
    stream: str = "order"

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return -(-self.samples_drawn // self.global_batch)

    def step_positions(self, step: int) -> Tensor:
        """Return the positions of one optimizer step, int64 (global batch,) or shorter for the last step."""
        return torch.arange(step * self.global_batch, min((step + 1) * self.global_batch, self.samples_drawn))

    def samples(self, positions: Tensor) -> Tensor:
        """Return the sample at each position, int64 of the same shape."""
        if self.classes is not None:
            samples = self.classes.samples(self.seed, positions, self.sampling)
        elif self.sampling == "with_replacement":
            samples = rng.integers(self.seed, self.stream, positions, self.num_samples)
        else:
            epochs = torch.div(positions, self.num_samples, rounding_mode="floor")
            samples = torch.empty_like(positions)
            for epoch in torch.unique(epochs).tolist():
                here = epochs == epoch
                order = _epoch_order(self.seed, self.stream, self.num_samples, epoch)
                samples[here] = order[positions[here] % self.num_samples]
        return samples if self.chosen is None else self.chosen[samples]


def samples_drawn(num_samples: int, epochs: int, global_batch: int, min_batches_per_epoch: int = 0) -> int:
    """Return the samples drawn in a run: samples x epochs, where short epochs are repeated.

    If ``num_samples / global_batch < min_batches_per_epoch``, the samples are repeated
    ``floor(min_batches_per_epoch * global_batch / num_samples) + 1`` times, as in the official code for few-shot sets.
    """
    repeats = 1
    if num_samples < min_batches_per_epoch * global_batch:
        repeats = min_batches_per_epoch * global_batch // num_samples + 1
    return num_samples * repeats * epochs


def _part(size: int, parts: int, part: int) -> tuple[int, int, int]:
    """Return (first, end, width) of one part of ``range(size)``; each part is padded to the width."""
    width = -(-size // parts)
    return min(part * width, size), min((part + 1) * width, size), width


@dataclass(frozen=True)
class MicroBatch:
    """Micro-batch of one rank.

    Attributes:
        positions: int64 (b,), positions in the sample order; padding repeats the last of the step.
        weights: float32 (b,), accumulation x ranks / size of the global batch, 0 for padding: Lightning divides the
            loss by the accumulation and DDP averages over ranks, so that sum(weight * loss) becomes the step's mean.
        step_positions: int64 (size of the global batch,), positions of all ranks and micro-batches.
        index: Index in the optimizer step.
        count: Number of micro-batches in this step.
    """

    positions: Tensor
    weights: Tensor
    step_positions: Tensor
    index: int
    count: int

    def entries(self, indices: Tensor, labels: Tensor, classes: Tensor | None) -> dict[str, Any]:
        """Return the batch entries of samples (b,) with labels (b,); their weights include class weights."""
        weight = self.weights if classes is None else self.weights * classes[labels]
        return {
            "weight": weight,
            "position": self.positions,
            "index": indices,
            "micro_batch": self.index,
            "micro_batches": self.count,
        }


@dataclass(frozen=True)
class TrainSchedule:
    """Micro-batches of one rank, numbered through the run.

    Every step has ``accumulate`` micro-batches, except a shorter last step, which has as few as possible; all ranks
    have the same number.

    Attributes:
        plan: Sample order; its global batch is batch size x accumulation x ranks.
        batch_size: Maximum samples of a micro-batch on one rank.
        accumulate: Micro-batches of a full step.
        world: Number of ranks.
        rank: This rank.
    """

    plan: DrawPlan
    batch_size: int
    accumulate: int = 1
    world: int = 1
    rank: int = 0

    def __len__(self) -> int:
        last = self.plan.samples_drawn - (self.plan.steps - 1) * self.plan.global_batch
        return (self.plan.steps - 1) * self.accumulate + self._micro_batches(last)

    def _micro_batches(self, size: int) -> int:
        return -(-size // (self.batch_size * self.world))

    def __getitem__(self, number: int) -> MicroBatch:
        step, index = divmod(number, self.accumulate)
        step_positions = self.plan.step_positions(step)
        count = self._micro_batches(len(step_positions))
        first, end, width = _part(len(step_positions), count * self.world, index * self.world + self.rank)
        positions = step_positions[-1:].repeat(width)
        positions[: end - first] = step_positions[first:end]
        weights = torch.zeros(width)
        weights[: end - first] = self.accumulate * self.world / len(step_positions)
        return MicroBatch(positions, weights, step_positions, index, count)


@dataclass(frozen=True)
class EvalSchedule:
    """Evaluation batches of one rank: every sample once in total, the same number of batches on all ranks."""

    num_samples: int
    batch_size: int
    world: int = 1
    rank: int = 0

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world))

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Return (samples, weights): int64 (b,) and float32 (b,), weight 0 for padding."""
        start = number * self.batch_size * self.world
        size = min(self.batch_size * self.world, self.num_samples - start)
        first, end, width = _part(size, self.world, self.rank)
        samples = torch.full((width,), start + size - 1)
        samples[: end - first] = torch.arange(start + first, start + end)
        weights = torch.zeros(width)
        weights[: end - first] = 1.0
        return samples, weights


class Batches(Protocol):
    """Numbered batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...


class _Guarded(Dataset[Batch]):
    """Dataset that returns errors as values: a worker process would hide the message in a traceback."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Batch:
        try:
            return self.batches[number]
        except UserError as error:
            return {"error": error}


def _ignore_sigterm_from_others(worker: int) -> None:
    """Ignore SIGTERM of batch systems, sent to all processes: training needs the workers to finish its step."""
    training = parent_process()
    if training is None or not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen(sender: int | None) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
            pass
        os._exit(0)

    threading.Thread(target=listen, args=(training.pid,), daemon=True).start()


def _stop_workers(inner: DataLoader[Batch]) -> None:
    if inner._iterator is not None:
        inner._iterator._shutdown_workers()  # type: ignore[attr-defined]
        inner._iterator = None


class Loader:
    """Data loader of numbered batches for Lightning.

    Its length is the whole run's, also if it starts later, because Lightning itself counts the batches before a resume.
    It is not a `DataLoader`, so that Lightning does not replace it.

    Args:
        batches: Numbered batches.
        start: Number of the first batch.
        num_workers: Worker processes; 0 loads in this process.
        skipped: Receives the name of each skipped image, with the reason.
    """

    def __init__(
        self, batches: Batches, start: int = 0, num_workers: int = 0, skipped: dict[str, str] | None = None
    ) -> None:
        self.batches = batches
        self.start = start
        self.skipped = {} if skipped is None else skipped
        self._inner: DataLoader[Batch] = DataLoader(
            _Guarded(batches),
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_sigterm_from_others,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # otherwise it would use the global generator
        )
        # where the garbage collector frees a cycle with the iterator in it, it closes the workers' queues first, and
        # PyTorch waits 5 s for each worker; this keeps the queues open until the workers have stopped
        Finalize(self, _stop_workers, (self._inner,))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._inner:
            if "error" in batch:
                _stop_workers(self._inner)  # the traceback may keep them alive
                raise batch["error"]
            for name, reason in batch.pop("bad", ()):
                if name not in self.skipped:
                    self.skipped[name] = reason
                    log.warning("skipped the unreadable image %s (%d so far)", name, len(self.skipped))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return no state: the trainer's step suffices. Its presence makes the loader resumable for Lightning."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing."""

    @property
    def _iterator(self) -> Any:
        """Inner iterator; Lightning shuts down its workers by this name."""
        return self._inner._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._inner._iterator = value
