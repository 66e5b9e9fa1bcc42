"""What data modules share, whatever a sample is: the planned draws of a run, and where a resumed one goes on."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from randlora_pl.data.sampling.balance import ClassDraws, class_weights
from randlora_pl.data.sampling.class_sizes import remarks
from randlora_pl.data.sampling.schedule import DrawPlan, EvalSchedule, TrainSchedule
from randlora_pl.utils.errors import UserError

log = logging.getLogger("randlora_pl")


class PlannedData(LightningDataModule):
    """Base of the data modules: training is one long loop over numbered draws.

    For Lightning it is a single epoch, however many epochs the draws stand for.

    Args:
        batch_size: Samples of a micro-batch on each device.
        eval_batch_size: Samples of an evaluation batch on each device.
        epochs: Times that the training samples are gone through; None for the data set's own number.
        steps: Optimizer steps instead of epochs.
        sampling: ``with_replacement`` or ``epochs``, see `DrawPlan`.
        seed: Selects the order.
        num_workers: Processes that prepare batches; None chooses.
        balance: ``weights`` or ``sampler`` where classes differ in size, see
            `randlora_pl.data.sampling.balance`; None for no correction.

    Attributes:
        unit: What a sample is called.
        plan: The draws of the run, after ``setup("fit")``.
        skipped: Unreadable samples that were skipped, with the reason.
    """

    unit = "samples"

    def __init__(
        self,
        batch_size: int,
        eval_batch_size: int,
        epochs: int | None,
        steps: int | None,
        sampling: str,
        seed: int,
        num_workers: int | None,
        balance: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.epochs, self.steps = epochs, steps
        self.sampling, self.seed, self.num_workers, self.balance = sampling, seed, num_workers, balance
        self.plan: DrawPlan | None = None
        self.skipped: dict[str, str] = {}
        self._remarked = False

    # -- what the application asks for

    def summary(self) -> dict[str, Any]:
        """Flat facts about the data and the run, JSON-ready; splits that were not needed are left out."""
        raise NotImplementedError

    def in_words(self, facts: dict[str, Any]) -> dict[str, str]:
        """What the start summary says of the data, line by line.

        Args:
            facts: From `summary`.
        """
        raise NotImplementedError

    def check_test(self) -> None:
        """Complains about test samples that are missing or wrong before hours of training rather than after them.

        Raises:
            UserError: They are.
        """

    def write_index(self, folder: Path) -> Path | None:
        """Writes which training samples were chosen into a folder; nothing where all are used."""
        return None

    def reuse_index(self, folder: Path) -> None:
        """Takes the training samples of an interrupted run."""

    @property
    def held_out(self) -> int:
        """Samples that a validation evaluates; 0 where none are kept out of the training."""
        return int(self.summary().get("val", 0))

    @property
    def window(self) -> int:
        """Samples of one optimizer step, on all devices and in all micro-batches."""
        return self.batch_size * self._accumulate * self._world

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The planned draws, so that a resumed run notices when it continues another plan."""
        if self.plan is None:
            return {}
        facts = asdict(replace(self.plan, classes=None)) | {"balance": self.balance}
        return {name: value for name, value in facts.items() if name != "classes"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Warns where the plan is not the checkpoint's: what the user types wins, but is not the same run."""
        now = self.state_dict()
        changed = [f"{name} {state_dict.get(name)} -> {now[name]}" for name in now if now[name] != state_dict.get(name)]
        if changed and state_dict:
            log.warning("the resumed run has other draws than its checkpoint: %s", ", ".join(changed))

    # -- for subclasses

    def _plan(self, samples: int, draws: int, labels: Tensor | None = None) -> None:
        """Plans the run: so many draws of so many samples, whose classes are ``labels`` where they have any."""
        classes = ClassDraws.of(labels) if self.balance == "sampler" and labels is not None else None
        self.plan = DrawPlan(samples, draws, self.window, self.seed, self.sampling, classes)

    def _class_weights(self, labels: Tensor, classes: int) -> Tensor | None:
        """Weights of the classes' losses, float32 (classes,), where they are asked for."""
        return class_weights(labels, classes) if self.balance == "weights" else None

    def _remark(self, labels: Mapping[str, NDArray[np.int64]], names: Sequence[str]) -> None:
        """Warn of classes that are lacking or small, once in a run and in its first process (see `remarks`)."""
        lines = remarks(labels, names, self.unit, self.balance is not None)
        if lines and self._rank == 0 and not self._remarked:
            log.warning("%s", "; ".join(lines))
        self._remarked = True

    def _schedule(self) -> TrainSchedule:
        """The micro-batches of this rank.

        Raises:
            UserError: There is no plan yet, or the trainer would go through it more than once.
        """
        if self.trainer is not None and self.trainer.max_epochs != 1:
            raise UserError(
                f"trainer.max_epochs is {self.trainer.max_epochs}, but a run is one pass over its planned draws: "
                "leave it at 1 and set --data.epochs or --data.steps"
            )
        if self.plan is None:
            raise UserError("Call setup('fit') before train_dataloader()")
        return TrainSchedule(self.plan, self.batch_size, self._accumulate, self._world, self._rank)

    def _eval_schedule(self, samples: int) -> EvalSchedule:
        """The evaluation batches of this rank."""
        return EvalSchedule(samples, self.eval_batch_size, self._world, self._rank)

    @property
    def _accumulate(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.accumulate_grad_batches)

    @property
    def _world(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.world_size)

    @property
    def _rank(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.global_rank)

    def _start(self, length: int) -> int:
        """Number of the first batch: that of the optimizer step that a resumed trainer has reached."""
        if self.trainer is None or self.trainer.global_step * self._accumulate >= length:
            return 0 if self.trainer is None else length
        start = self.trainer.global_step * self._accumulate
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if done != start:
            raise UserError(
                f"The checkpoint was saved {done - start} micro-batches into an optimizer step of {self._accumulate}; "
                "resume from one that was saved after a step"
            )
        return start
