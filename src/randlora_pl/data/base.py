"""Base data module: planned sample order of a run and exact resume, for any kind of sample.

The processes of a job compare their samples as numbers (`Part`).
"""

import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from randlora_pl.data.loader import (
    Batch,
    Batches,
    ClassDraws,
    DrawPlan,
    EvalSchedule,
    TrainSchedule,
    class_weights,
    remarks,
    samples_drawn,
)
from randlora_pl.data.readers import Samples
from randlora_pl.data.sources import ArrayImages, FileImages, Ints
from randlora_pl.data.splits import search_parts
from randlora_pl.data.validate import check_epochs
from randlora_pl.utils.errors import UserError, log
from randlora_pl.utils.machine import usable_cores
from randlora_pl.utils.options import Declared, NotNegative, Share, between

TEXTS = ("class names", "templates")
"""Parts that are words of the dataset or of a file of the user."""
BLOCK = 1024
"""Samples that have a checksum of their own."""


@dataclass(frozen=True)
class Part:
    """Samples of a split: numbers, int64 (samples, columns), that differ if a sample differs, and a description."""

    table: Ints
    describe: Callable[[int], str]

    def digest(self) -> list[Any]:
        """Return the number of samples and a checksum of all."""
        return [len(self.table), hashlib.sha256(self.table.tobytes()).hexdigest()]

    def blocks(self) -> list[str]:
        """Return a short checksum of each block of samples."""
        starts = range(0, len(self.table), BLOCK)
        return [hashlib.sha256(self.table[start : start + BLOCK].tobytes()).hexdigest()[:16] for start in starts]

    def samples(self, block: int) -> list[str]:
        """Return numbers and description of each sample of a block."""
        indices = range(block * BLOCK, min(len(self.table), (block + 1) * BLOCK))
        return [json.dumps([self.table[index].tolist(), self.describe(index)]) for index in indices]


def image_parts(held: Mapping[str, Samples], names: Sequence[str], templates: Sequence[str]) -> dict[str, Part]:
    """Return the samples of image splits, class names and templates.

    A sample has a name relative to the dataset, a class, and the size or the pixels of the image.
    """
    parts = {f"{split} samples": _image_part(samples) for split, samples in held.items()}
    return parts | {name: word_part(words) for name, words in zip(TEXTS, (names, templates), strict=True)}


def word_part(names: Sequence[str]) -> Part:
    """Return names, such as class names."""
    table = np.array([zlib.crc32(word.encode("utf-8", "surrogateescape")) for word in names], dtype=np.int64)
    return Part(table.reshape(-1, 1), lambda index: repr(names[index]))


def _image_part(samples: Samples) -> Part:
    images = getattr(samples.images, "images", samples.images)  # behind a cache
    # the size of each file, or a checksum of each array of pixels; 0 where neither is known at once
    sizes = np.zeros(len(samples), dtype=np.int64)
    if isinstance(images, ArrayImages):
        sizes[:] = [zlib.crc32(images.array[row].tobytes()) for row in samples.rows]
    elif isinstance(images, FileImages):
        # of at most 10,000 files, evenly spread: a million takes minutes on a network disk
        for index in range(0, len(samples), -(-len(samples) // 10_000) or 1):
            try:
                sizes[index] = images.path(int(samples.rows[index])).stat().st_size
            except OSError:
                sizes[index] = -1

    def describe(index: int) -> str:
        size = f", {sizes[index]:,} bytes" if isinstance(images, FileImages) and sizes[index] else ""
        return f"{samples.keys[index]} (class {samples.labels[index]}{size})"

    labels = samples.labels
    if samples.sets is not None:
        ends = itertools.pairwise(samples.sets.indptr)
        labels = np.array([zlib.crc32(samples.sets.indices[start:end].tobytes()) for start, end in ends], np.int64)
    return Part(np.stack([samples.numbers, labels, sizes], axis=1), describe)


def text_part(columns: Mapping[str, np.ndarray[Any, Any]], ends: Ints) -> Part:
    """Return the samples of a split of texts.

    Args:
        columns: Numbers of all samples, one after another, or one number per sample.
        ends: int64 (samples + 1,), where each sample begins and ends.
    """
    count = len(ends) - 1
    table = np.zeros((count, len(columns)), dtype=np.int64)
    for place, column in enumerate(columns.values()):
        single = len(column) == count
        for index in range(count):
            piece = column[index : index + 1] if single else column[ends[index] : ends[index + 1]]
            table[index, place] = zlib.crc32(piece.tobytes())

    def describe(index: int) -> str:
        start, end = int(ends[index]), int(ends[index + 1])
        singles = [f", {name} {column[index]}" for name, column in columns.items() if len(column) == count]
        first = " ".join(map(str, columns["input_ids"][start : min(end, start + 8)]))
        return f"a text of {end - start} tokens ({first}{' ...' if end - start > 8 else ''}){''.join(singles)}"

    return Part(table, describe)


BatchSize = Annotated[int, between(1, 2**24)]
Length = Annotated[int, between(1, 10**9)]
"""Epochs, steps or samples: positions in the sample order have 64 bits."""


class PlannedData(Declared, LightningDataModule):
    """Base of the data modules: training is one long loop over a numbered sample order.

    Lightning runs it as a single epoch, for any number of epochs in the plan.

    Attributes:
        unit: Name of the samples in messages.
        plan: Sample order of the run, after ``setup("fit")``.
        search_plans: Sample orders of `search_batch` by part, after ``setup("fit")``; empty if nothing searches.
        skipped: Skipped unreadable samples, with the reason.
    """

    unit = "samples"

    if TYPE_CHECKING:  # each subclass has its own default
        dataset: str
    batch_size: BatchSize
    """Micro-batch size per device."""
    eval_batch_size: BatchSize
    """Evaluation batch size per device."""
    epochs: Length | None = None
    """Passes over the training samples. Default: the dataset's own number (for images Table 7 of the paper, and 10 for
    few-shot training; 3 for prompts, 10 for labeled texts)."""
    steps: Length | None = None
    """Optimizer steps instead of epochs."""
    sampling: Literal["epochs", "with_replacement"] = "epochs"
    """`epochs` (each sample once per epoch) or `with_replacement` (independent draws)."""
    seed: int = 0
    """Seed of the few-shot images, the order and the augmentation; validation and test do not depend on it."""
    num_workers: Annotated[int, NotNegative] | None = None
    """Worker processes. Default: 0 for texts and small images in memory, else up to 8, or 32 per GPU."""
    balance: Literal["weights", "sampler"] | None = None
    """Correction if classes differ in size: `weights` weighs losses by the inverse size of the class, `sampler` draws
    every class equally often. Default: none."""
    search_fraction: Annotated[float, Share] = 0.3
    """Fraction of the training samples, of each class, on which a method that searches (`AutoLoRA`) chooses; its
    weights train on the others. All other methods train on all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        LightningDataModule.__init__(self)
        self.plan: DrawPlan | None = None
        self.search_plans: dict[str, DrawPlan] = {}
        self._search_batches: dict[str, Batches] = {}
        self.skipped: dict[str, str] = {}
        self._remarked = False

    def _check_run(self, without_classes: str) -> None:
        """Check length, worker processes and balance of a run; ``without_classes`` names labels other than classes."""
        if self.epochs is not None and self.steps is not None:
            raise UserError(
                f"--data.epochs {self.epochs} and --data.steps {self.steps} cannot be combined. Set only one of them"
            )
        most = max(64, 4 * usable_cores())  # each process takes hundreds of megabytes
        if self.num_workers is not None and self.num_workers > most:
            raise UserError(
                f"--data.num_workers is {self.num_workers}, but at most {most} can help here: 4 per core, or 64"
            )
        if self.balance is not None and without_classes:
            raise UserError(f"--data.balance {self.balance} needs classes, but {without_classes} have none. Remove it")

    # -- used by the application

    def summary(self) -> dict[str, Any]:
        """Return flat, JSON-ready facts about the data and the run; splits that were not read are omitted."""
        raise NotImplementedError

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the start summary's lines about the data; ``facts`` is the result of `summary`."""
        raise NotImplementedError

    def check_test(self) -> None:
        """Check the test samples before hours of training rather than after them.

        Raises:
            UserError: Test samples are missing or wrong.
        """

    def write_index(self, folder: Path) -> Path | None:
        """Write the chosen training samples into a folder; return None if all are used."""
        return None

    def reuse_index(self, folder: Path) -> None:
        """Use the training samples of an interrupted run."""

    def batches(self, schedule: TrainSchedule, search: bool = False) -> Batches:
        """Return the numbered training batches of a schedule; batches for a search are not blended."""
        raise NotImplementedError

    def search_batch(self, step: int, part: Literal["search", "train"] = "search") -> Batch:
        """Return this rank's batch for a search at an optimizer step, of one micro-batch: a pure function of the step.

        Args:
            step: Finished optimizer steps.
            part: ``search`` for the held-out training samples, ``train`` for the ones that the weights train on.

        Raises:
            UserError: No search was planned.
        """
        if part not in self._search_batches:
            if part not in self.search_plans:
                raise UserError("search_batch needs setup('fit') with a method that searches, such as AutoLoRA.")
            schedule = TrainSchedule(self.search_plans[part], self.batch_size, 1, self._world, self._rank)
            self._search_batches[part] = self.batches(schedule, search=True)
        batch = self._search_batches[part][step]
        batch.pop("bad", None)  # skipped, with weight 0
        return batch

    @property
    def notes(self) -> str:
        """Text about balance and search for the start summary, with a leading comma, or ""."""
        plan = self.search_plans.get("search")
        words = {"weights": ", losses weighted by class", "sampler": ", classes drawn equally often", None: ""}
        return words[self.balance] + (f", {plan.num_samples:,} of train for the search" if plan else "")

    @property
    def held_out(self) -> int:
        """Number of validation samples; 0 if none are held out."""
        return int(self.summary().get("val", 0))

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, on all devices and in all micro-batches."""
        return self.batch_size * self._accumulate * self._world

    def finished_epochs(self, steps: int) -> int:
        """Return the epochs that end within a number of optimizer steps; 0 if the run is planned in steps."""
        if self.plan is None or not self.epochs:
            return 0
        drawn = min(steps * self.plan.global_batch, self.plan.samples_drawn)
        return drawn * self.epochs // self.plan.samples_drawn

    def resolved(self) -> dict[str, Any]:
        """Return the constructor arguments with derived values, for the resolved config."""
        return {name: getattr(self, name) for name in ("epochs", "flip") if hasattr(self, name)}

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the plan under the keys of all checkpoints so far; a resumed run detects a changed one."""
        if self.plan is None:
            return {}
        drawn = {"total_draws": self.plan.samples_drawn, "window": self.plan.global_batch, "seed": self.plan.seed}
        return {"num_samples": self.plan.num_samples, **drawn, "sampling": self.plan.sampling, "balance": self.balance}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warn if the plan differs from the checkpoint's; the user's options are used."""
        now = self.state_dict()
        changed = [f"{name} {state_dict.get(name)} -> {now[name]}" for name in now if now[name] != state_dict.get(name)]
        if changed and state_dict:
            log.warning("the resumed run has a different sample order than its checkpoint: %s", ", ".join(changed))

    # -- for subclasses

    def run_facts(self) -> dict[str, Any]:
        """Return steps and samples of the planned run; empty if none is planned."""
        if self.plan is None:
            return {}
        facts = {"steps": self.plan.steps, "draws": self.plan.samples_drawn, "window": self.plan.global_batch}
        facts |= {"search": self.search_plans["search"].num_samples} if self.search_plans else {}
        return facts | {"sampling": self.sampling} | ({"balance": self.balance} if self.balance else {})

    @property
    def learner(self) -> object:
        """The objective of the run's module, or a module of another kind; None outside a run."""
        module = None if self.trainer is None else self.trainer.lightning_module
        objective: object = getattr(module, "objective", None)  # a module of a user may call its loss so
        return objective if hasattr(objective, "blended_labels") else module

    def _plan(
        self, samples: int, labels: Tensor | None, least: int = 0, keys: Ints | None = None, groups: Ints | None = None
    ) -> None:
        """Plan the run, and the batches of a search if the method searches.

        All arrays are int64 (samples,): classes, hashes of the samples' keys (by default their indices), and groups
        that the search does not separate. An epoch has at least ``least`` batches.
        """
        task = self.learner
        self.search_plans, self._search_batches = {}, {}
        parts: dict[str, Tensor] = {}
        if getattr(getattr(task, "adapter", None), "searches", False) is True:
            classes = np.zeros(samples, dtype=np.int64) if labels is None else labels.numpy()
            keys = np.arange(samples) if keys is None else keys
            train, search = search_parts(classes, keys, self.search_fraction, self.seed, groups)
            parts, samples = {"search": torch.from_numpy(search), "train": torch.from_numpy(train)}, len(train)
        if self.steps is None:
            drawn = samples_drawn(samples, self.epochs or 0, self.global_batch, least)
        else:
            drawn = self.steps * self.global_batch
        self.plan = self._order(parts.get("train"), samples, drawn, labels)
        for part, chosen in parts.items():
            size = self.batch_size * self._world
            plan = self._order(chosen, len(chosen), self.plan.steps * size, labels)
            self.search_plans[part] = replace(plan, global_batch=size, stream=f"search/{part}")

    def _compare(self, parts: Callable[[], Mapping[str, Part]]) -> None:
        """Let the processes of a job find out whether they have the same samples; all wait for each other."""
        if self._job is None:
            return
        if hasattr(self._job, "compare"):
            self._job.compare(parts())
        else:  # chosen by the user
            self._job.barrier("samples")

    def _order(self, chosen: Tensor | None, samples: int, drawn: int, labels: Tensor | None) -> DrawPlan:
        classes = None
        if self.balance == "sampler" and labels is not None:
            classes = ClassDraws.from_labels(labels if chosen is None else labels[chosen])
        return DrawPlan(samples, drawn, self.global_batch, self.seed, self.sampling, classes, chosen)

    def _class_weights(self, labels: Tensor, classes: int) -> Tensor | None:
        return class_weights(labels, classes) if self.balance == "weights" else None

    def _remark(self, labels: Mapping[str, Ints], names: Sequence[str]) -> None:
        """Warn about missing or small classes, once per run on rank 0 (see `remarks`)."""
        lines = remarks(labels, names, self.unit, self.balance is not None or getattr(self, "several", False))
        if lines and self._rank == 0 and not self._remarked:
            log.warning("%s", "; ".join(lines))
        self._remarked = True

    def _schedule(self) -> TrainSchedule:
        if self.trainer is not None:
            check_epochs(self.trainer.max_epochs)
        if self.plan is None:
            raise UserError("Call setup('fit') before train_dataloader()")
        return TrainSchedule(self.plan, self.batch_size, self._accumulate, self._world, self._rank)

    def _eval_schedule(self, samples: int) -> EvalSchedule:
        return EvalSchedule(samples, self.eval_batch_size, self._world, self._rank)

    @property
    def _accumulate(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    @property
    def _world(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.world_size)

    @property
    def _job(self) -> Any:
        """Lightning's strategy for several processes; None for one."""
        return None if self.trainer is None or self._world == 1 else self.trainer.strategy

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.global_rank)

    def _start(self, length: int) -> int:
        """Return the number of the first batch, from the optimizer step of a resumed trainer."""
        if self.trainer is None:
            return 0
        start = self.trainer.global_step * self._accumulate
        if start >= length:
            return length
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done != start:
            raise UserError(
                f"The checkpoint was saved {done - start} micro-batches into an optimizer step of {self._accumulate}; "
                "resume from one saved after a step"
            )
        return start
