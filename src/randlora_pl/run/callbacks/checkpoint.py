"""Validations of a run, checkpoints of what trains (the last, the best, adapter folders), and the mean over epochs.

Files are written atomically, and verified before they are read.
"""

import hashlib
import io
import math
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from safetensors.torch import load, save
from torch import Tensor, nn

from randlora_pl.data import ImageData
from randlora_pl.data.base import PlannedData
from randlora_pl.tasks.module import own_module, total_steps
from randlora_pl.utils import __version__
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files import write_bytes
from randlora_pl.utils.options import Count, Declared, Positive
from randlora_pl.utils.run_files import ADAPTER, BEST, LAST, run_folder


class CheckpointFile(TorchCheckpointIO):
    """Checkpoint IO that writes next to the final name.

    Lightning writes to the system's temporary folder, which may be small or on another disk, and files left there by
    a killed run are never cleaned up. Tensors that a method has derived from the weights never change, so they are
    written once, to a file next to the checkpoints whose name has their checksum.
    """

    _derived: tuple[object, str] = (None, "")  # identity and file name of the derived tensors written last

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **more: Any) -> None:
        """Write the file atomically over an older one, which is kept if this fails."""
        tensors, folder, buffer = checkpoint.get("derived"), Path(path).parent, io.BytesIO()
        if tensors:
            key = folder, *((name, tensor.data_ptr(), tensor._version) for name, tensor in tensors.items())
            if key != self._derived[0]:
                content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
                write_bytes(folder / _name_of(content), content)
                self._derived = key, _name_of(content)
        torch.save({**checkpoint, "derived": self._derived[1] if tensors else None}, buffer)
        write_bytes(Path(path), buffer.getbuffer())

    def load_checkpoint(self, path: str | Path, *args: Any, **more: Any) -> dict[str, Any]:
        """Read the file.

        Raises:
            UserError: The file is damaged or not a checkpoint.
        """
        check_checkpoint(Path(path))
        try:
            checkpoint = super().load_checkpoint(path, *args, **more)
        except Exception as error:  # damaged headers raise many types, from PyTorch and pickle
            raise UserError(_damage_message(Path(path), str(error).splitlines()[0] if str(error) else "")) from error
        if isinstance(checkpoint.get("derived"), str):
            file = Path(path).parent / Path(checkpoint["derived"]).name
            content = file.read_bytes() if file.is_file() else b""
            if file.name != _name_of(content):
                raise UserError(
                    f"{path} needs {file.name} next to it, which is missing or damaged. Copy both files again."
                )
            checkpoint["derived"] = load(content)
        return checkpoint


def _name_of(derived: bytes) -> str:
    return f"derived-{hashlib.sha256(derived).hexdigest()[:16]}.safetensors"


def check_checkpoint(file: Path) -> None:
    """Verify the checksum of every part of a checkpoint; PyTorch writes them but does not check them (0.5 s per GB).

    Raises:
        UserError: The file is truncated, damaged or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged header can look like encryption, another compression, a huge size ...
        raise UserError(_damage_message(file, str(error))) from error
    if bad is not None:
        raise UserError(_damage_message(file, f"bad checksum of {bad}"))


def _damage_message(file: Path, why: str) -> str:
    """Return an error message for an unreadable checkpoint."""
    return (
        f"The checkpoint {file} is cut off or damaged{f' ({why})' if why else ''}. Restore a copy of it, or delete "
        "it; fit --resume then restarts the training from step 0."
    )


_TRAINED_ON = (
    *("dataset", "split", "class_half", "train", "shots", "fraction", "train_split"),
    *("steps", "draws", "window", "seed"),
    *("pairs", "max_length"),  # of labelled texts
)
"""Facts about the training data that an adapter stores; resuming does not change them."""


def is_finite(module: nn.Module) -> bool:
    """Return True if every trainable tensor is free of infinities and NaNs."""
    finite = [torch.isfinite(p).all() for p in module.parameters() if p.requires_grad]
    return not finite or bool(torch.stack(finite).all())  # the host waits for the device once


class RunCheckpoint(Declared, Callback):
    """Write ``checkpoints/last.ckpt``, ``adapter`` and, with validation, ``adapter-best``.

    A checkpoint has the trainable parameters, the optimizer and the loop state, without the frozen model.
    """

    every_n_steps: Count = 50
    """Optimizer steps between two checkpoints. A resumed run repeats at most this many."""
    monitor: str = ""
    """Validation metric that selects the best adapter; by default the main metric of the task."""
    mode: Literal["max", "min"] | None = None
    """``max`` or ``min``, the direction of the metric; by default the task's."""
    patience: Count | None = None
    """Stop the training after this many validations without improvement; ``null`` disables it."""
    test: Literal["last", "best"] | None = None
    """Adapter that `fit` tests at its end: ``last`` (default) or ``best`` (default with patience)."""
    scale: Literal["auto"] | None = None
    """``auto``, against forgetting, ends with W0 + s (W - W0) for the s in 0, 0.1, ..., 1 with the highest mean of two
    validation accuracies: of the task, and of the data in ``--data.keep``; with ties, the smallest s. The folder
    ``adapter`` has it, of the last or the best weights as ``test`` says. For tasks that compare images with names of
    classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.test = self.test or ("last" if self.patience is None else "best")
        self.best: float | None = None
        self.best_step = 0
        self.validated: dict[str, float] = {}
        self.scaled: dict[str, Any] = {}  # what `choose_scale` found
        self._kept: ImageData | None = None
        self._seen_step = -1
        self._whole_step = False  # True if the last batch ended an optimizer step
        self._validates = False  # True while the validation of this step runs

    def state_dict(self) -> dict[str, Any]:
        """Return the best metric and the metrics of the last validation."""
        return {"best": self.best, "best_step": self.best_step, "validated": self.validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of the resumed run."""
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self.validated = dict(state_dict["validated"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the scale, ask the task for its metric, and use `CheckpointFile` unless the user has set a plugin."""
        data: Any = getattr(trainer, "datamodule", None)
        task = own_module(pl_module).objective
        self._kept = None
        if self.scale or getattr(data, "keep", None):
            from randlora_pl.run.callbacks.forgetting import check_options, kept_data

            check_options(self.scale, task, data, hasattr(trainer.strategy, "shards"))
            self._kept = kept_data(data)  # also before the test of the pretrained model
        if stage == "fit":
            several = getattr(trainer.datamodule, "several", False)  # type: ignore[attr-defined]
            self.monitor = self.monitor or f"val/{task.measure(several=several).name}"
            self.mode = self.mode or task.measure(self.monitor.removeprefix("val/")).mode
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFile()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the best metric of another run's checkpoint (``--ckpt_path``), whose best adapter is not here."""
        if not (run_folder(trainer) / BEST).is_dir():
            self.best, self.best_step = None, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Skip a checkpoint of the starting point, which has nothing new."""
        self._seen_step = trainer.global_step
        self._whole_step = trainer.global_step > 0  # a resumed run may begin with a validation

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save right after an optimizer step, never between its micro-batches; on SIGTERM at once."""
        step, every = trainer.global_step, trainer.val_check_batch
        self._whole_step, self._seen_step = step != self._seen_step, step
        if sum(trainer.num_val_batches) and every is not None:  # None: the interval is in seconds
            last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
            if last if math.isinf(every) else (batch_idx + 1) % every == 0:
                return  # a validation follows, which saves as well
        if self._whole_step and (step % self.every_n_steps == 0 or trainer.received_sigterm):
            self._save_last(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before a validation, which may take a long time."""
        if self._whole_step and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._validates = True
            self._save_last(trainer, pl_module)
            self._validates = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Mark validation as started in the loop state if a resumed run is to repeat it, else as ended.

        Lightning's counts of a repeated validation would make the next resumed run repeat the rest of it.
        """
        if "loops" not in checkpoint:  # weights only
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
        done = progress["total"]["completed"]
        started = done + self._validates
        progress["total"] = {"ready": started, "started": started, "processed": done, "completed": done}
        if self._validates:
            progress["current"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the adapter if its metric is the best so far, then a checkpoint that includes this validation."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.validated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if self.monitor not in self.validated:
            hint = near(self.monitor, self.validated)
            raise UserError(
                f"checkpoint.monitor is {self.monitor!r}, which no validation logs.{hint} "
                f"Metrics: {', '.join(self.validated)}"
            )
        value = self.validated[self.monitor]
        sign = 1 if self.mode == "max" else -1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best):
            self.best, self.best_step = value, trainer.global_step
            save_adapter_of(trainer, pl_module, BEST, {self.monitor: value, "step": self.best_step})
        if self._whole_step:
            self._save_last(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run; after an early stop, keep the older checkpoint.

        Lightning has marked its only epoch as completed, so a run resumed from here would not continue.
        """
        if trainer.global_step >= total_steps(trainer):
            self._save_last(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last weights as an adapter folder, also if a resumed run had nothing left to train."""
        summary: dict[str, Any] = {"step": trainer.global_step}
        if self._kept is not None and is_finite(pl_module):
            best = run_folder(trainer) / BEST if self.test == "best" and self.best is not None else None
            summary |= {} if best is None else {self.monitor: self.best, "step": self.best_step}
            from randlora_pl.run.callbacks.forgetting import choose_scale

            self.scaled = choose_scale(trainer, own_module(pl_module).objective, self._kept, best)
        save_adapter_of(trainer, pl_module, ADAPTER, summary | self.scaled)

    def _save_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_finite(pl_module):  # else keep the older, finite checkpoint
            trainer.save_checkpoint(run_folder(trainer) / LAST)


def save_adapter_of(trainer: Trainer, pl_module: LightningModule, name: str, summary: dict[str, Any]) -> None:
    """Write an adapter folder of a run, with facts about its training data and images, if the weights are finite."""
    task = own_module(pl_module).objective
    if not trainer.is_global_zero or not is_finite(task):
        return
    data: PlannedData = trainer.datamodule  # type: ignore[attr-defined]
    facts = planned(data) if hasattr(data, "summary") else {}
    about = {name: facts[name] for name in _TRAINED_ON if facts.get(name) is not None} | {"randlora_pl": __version__}
    frame = getattr(data, "frame", None)
    task.save(run_folder(trainer) / name, summary | about | ({"frame": asdict(frame)} if frame is not None else {}))


def planned(data: PlannedData) -> dict[str, Any]:
    """Return the facts about the data, with the steps limited to ``--trainer.max_steps``."""
    facts = dict(data.summary())
    limit = data.trainer.max_steps if data.trainer is not None else -1
    if 0 <= limit < facts.get("steps", 0):
        facts |= {"steps": limit, "draws": limit * facts["window"]}
    return facts


def steps_between(steps: int, data: PlannedData) -> int:
    """Return the optimizer steps between two validations of a run.

    The interval is one pass over the training samples, longer if the validation set is relatively large, at least a
    twentieth and at most a fifth of the run. Runs of less than ten steps are validated at their end only.
    """
    if steps < 10:
        return max(1, steps)
    assert data.plan is not None
    samples: int = max(data.plan.num_samples, 8 * data.held_out)  # validation then costs about 4 % of the training
    apart = math.ceil(samples / int(data.plan.global_batch))
    return min(max(apart, math.ceil(steps / 20)), steps // 5)


class ValidationSchedule(Callback):
    """Validate every `steps_between` optimizer steps, and at the end of the run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the validations; a resumed run may start with one."""
        steps: int = steps_between(total_steps(trainer), trainer.datamodule)  # type: ignore[attr-defined]
        self._every = steps * trainer.accumulate_grad_batches
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Set the interval, so that a validation ends the run, too.

        Lightning validates if ``val_check_batch`` divides the number of batches so far.
        """
        progress = trainer.fit_loop.epoch_loop.batch_progress
        ends = progress.is_last_batch or trainer.global_step >= total_steps(trainer)
        trainer.val_check_batch = max(1, progress.current.ready) if ends else self._every


def validations(trainer: Trainer, data: PlannedData) -> int | None:
    """Return the number of validations of a planned run, or None if the interval is in time."""
    if not (data.held_out and trainer.limit_val_batches and trainer.check_val_every_n_epoch in (None, 1)):
        return 0
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return None
    steps, callbacks = total_steps(trainer), trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, ValidationSchedule) for callback in callbacks):
        return math.ceil(steps / steps_between(steps, data))
    batches, interval = steps * trainer.accumulate_grad_batches, trainer.val_check_interval
    if isinstance(interval, float):  # a fraction of all batches
        assert data.plan is not None
        interval = max(1, int(data.plan.steps * trainer.accumulate_grad_batches * interval))
    return batches // interval if interval else 0


class Patience(EarlyStopping):
    """Stop after ``patience`` validations without improvement; a resumed run stops at the same step.

    It precedes `RunCheckpoint` in the list of callbacks, so that a checkpoint includes its last validation.
    """

    def __init__(self, monitor: str, mode: str, patience: int) -> None:
        # `RunCheckpoint` reports a wrong monitor; a non-finite metric is not an improvement.
        super().__init__(
            monitor, patience=patience, mode=mode, strict=False, check_finite=False, check_on_train_epoch_end=False
        )

    @property
    def exhausted(self) -> bool:
        """True if the patience is used up."""
        return self.wait_count >= self.patience

    @property
    def reason(self) -> str:
        """Reason for the early stop."""
        return f"{self.monitor} did not improve in {self.wait_count} validation{'s' if self.wait_count > 1 else ''}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count of the resumed run, with the patience set last."""
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a run without validations."""
        data: PlannedData = trainer.datamodule  # type: ignore[attr-defined]
        if data.plan is None:
            data.setup("fit")  # on every rank: setup synchronizes them
        if validations(trainer, data) == 0:
            raise UserError(
                f"checkpoint.patience is {self.patience}, but this run has no validation. Hold out {data.unit} for "
                "validation, set --trainer.limit_val_batches and --trainer.val_check_interval to use them, or remove "
                "--checkpoint.patience."
            )

    on_test_start = on_fit_start  # a zero-shot test comes first

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a resumed run that was killed after its final validation."""
        if self.exhausted:
            trainer.should_stop = True


def gaussian_weights(epochs: int, mu: float, sigma: float) -> list[float]:
    """Return weights in proportion to N(e; mu, sigma^2) of the epochs e = 1 to ``epochs``, whose sum is 1.

    They are computed as a softmax, so that a small ``sigma`` selects the epoch that is next to ``mu``.
    """
    exponents = [-0.5 * ((epoch - mu) / sigma) ** 2 for epoch in range(1, epochs + 1)]
    parts = [math.exp(exponent - max(exponents)) for exponent in exponents]
    return [part / sum(parts) for part in parts]


class GaussianAverage(Declared, Callback):
    """Average the values of what trains at the ends of all epochs; the run ends with the mean.

    The mean replaces the last values when the training is over: the adapter and the final test have it, validations
    and checkpoints do not. Frozen weights are left alone, and sums are in float32. Of a weight update it averages the
    trained factors; their product differs from the mean of the products in second order.

    Few-shot training of PromptSRC (arXiv 2307.06948) has 50 epochs with mean 30 and deviation 30, or 45 and 5
    for some datasets. The callback precedes `RunCheckpoint` in the list.

    Examples:
        >>> trainer = make_trainer(callbacks=[GaussianAverage(mu=15, sigma=1)])
    """

    mu: float = 15.0
    """Epoch with the largest weight; the first epoch is 1."""
    sigma: Annotated[float, Positive] = 1.0
    """Standard deviation, in epochs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._mean: dict[str, Tensor] = {}
        self._total = 0.0  # of the weights so far

    def state_dict(self) -> dict[str, Any]:
        """Return the mean of the epochs so far, and the sum of their weights."""
        return {"mean": self._mean, "total": self._total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the mean of the resumed run."""
        self._mean, self._total = dict(state_dict["mean"]), state_dict["total"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that has no weights to average.

        Raises:
            UserError: The run has no epochs, or a classifier that is empty in its first stage.
        """
        if not getattr(trainer.datamodule, "epochs", None):  # type: ignore[attr-defined]
            raise UserError("GaussianAverage is over epochs: set --data.epochs instead of --data.steps.")
        if getattr(getattr(pl_module, "objective", None), "classifier_steps", 0):
            raise UserError(
                "GaussianAverage would average zeros of the classifier that classifier_steps fills at the end: set "
                "--model.classifier_steps 0, or remove the callback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new mean, or continue the resumed run's."""
        data: PlannedData = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.global_step == 0:
            self._mean, self._total = {}, 0.0
        self._finished = data.finished_epochs(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Add the values of the epochs that end with this step; a step may end several short ones."""
        data: PlannedData = trainer.datamodule  # type: ignore[attr-defined]
        before, self._finished = self._finished, data.finished_epochs(trainer.global_step)
        if self._finished > before:
            assert data.epochs
            weight = sum(gaussian_weights(data.epochs, self.mu, self.sigma)[before : self._finished])
            self._total += weight
            for name, value in _trained(pl_module).items():
                if name not in self._mean:
                    self._mean[name] = value.float().clone()
                elif self._total > 0:
                    self._mean[name] = self._mean[name].to(value.device).lerp_(value.float(), weight / self._total)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the last values by the mean, also if a resumed run had nothing left to train."""
        for name, value in _trained(pl_module).items() if self._mean else ():
            value.copy_(self._mean[name])


def _trained(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
