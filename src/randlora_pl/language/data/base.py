"""Base of the data modules of texts: encoded once, then handed over in numbered batches."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from randlora_pl.data.base import PlannedData
from randlora_pl.data.catalog.registry import default_root
from randlora_pl.data.loading.loader import Loader
from randlora_pl.data.parts import Part
from randlora_pl.data.sampling.schedule import TrainSchedule, samples_drawn
from randlora_pl.data.validate import check_run
from randlora_pl.language.data.batches import TextEvalBatches, TextSamples, TextTrainBatches
from randlora_pl.language.models.tokenization import Lengths, pad_id
from randlora_pl.utils.errors import UserError


class TokenData(PlannedData):
    """Base of the data modules of texts. Subclasses read and encode.

    Attributes:
        own_datasets: Names of datasets of the user's own files.
        usual_epochs: Default number of passes over the training samples.
        limit: Name of the option with the most tokens of a sample.
        lengths: Effect of the limit on the encoded samples by split, after `setup`.
        pad: Number to pad with, after `setup`.
    """

    own_datasets: ClassVar[tuple[str, ...]] = ()
    usual_epochs = 3
    limit: ClassVar[str]

    dataset: str
    """Name of the dataset."""
    if TYPE_CHECKING:  # it becomes a path
        root: Any = None
    else:
        root: str | Path | None = None
        """Folder that holds the data (or one file to train on alone); by default the user's data folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self.epochs, self.steps, self.num_workers)
        if self.dataset in self.own_datasets and self.root is None:
            raise UserError(
                f"The dataset {self.dataset!r} needs --data.root: a folder with train.{self.dataset}, or one file"
            )
        self.epochs = self.usual_epochs if self.epochs is self.steps is None else self.epochs
        self.root = default_root() if self.root is None else Path(self.root).expanduser()
        self.lengths: dict[str, Lengths] = {}
        self._tokenizer: Any = None
        self._held: dict[str, TextSamples] = {}  # encoded samples by split
        self.pad = 0
        self._digest = ""  # of the training texts
        self._tests_read = False  # or looked for in vain

    # -- what a subclass gives

    def read(self, learns: bool, tests: bool) -> None:
        """Read and encode the training and validation samples, the test samples, or both.

        Raises:
            UserError: They are missing or wrong.
        """
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return the facts of `summary` that only this kind of texts has."""
        raise NotImplementedError

    def parts(self) -> dict[str, Part]:
        """Return what all processes of a job must have in common."""
        return {f"{split} samples": held.part() for split, held in self._held.items()}

    @property
    def kind(self) -> str:
        """Description of the labels for the start summary, with a comma at its end."""
        return ""

    # -- what Lightning calls

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what the stage needs, and plan the sample order.

        Raises:
            UserError: The data are missing or wrong, or the tokenizer is missing.
        """
        task = None if self.trainer is None else self.trainer.lightning_module
        self._tokenizer = getattr(task, "vocabulary", self._tokenizer)
        if self._tokenizer is None:
            raise UserError("texts need the tokenizer of a language task: use --model CausalLMTask.")
        if not self._held:
            self.pad = pad_id(self._tokenizer)  # once, as it may log a message
        learns = stage in ("fit", "validate", None) and "train" not in self._held
        tests = stage in ("test", "predict", None) and "test" not in self._held
        if learns or tests:
            self.read(learns, tests)
        self._compare(self.parts)
        if stage in ("fit", None):
            steps, epochs, size = self.steps, self.epochs or 0, self.global_batch
            drawn = lambda count: samples_drawn(count, epochs, size) if steps is None else steps * size  # noqa: E731
            self._plan(len(self._held["train"]), drawn, self._labels())

    def train_dataloader(self) -> Loader:
        """Return the training batches of this rank, from the trainer's optimizer step on."""
        schedule = self._schedule()
        return Loader(self.batches(schedule), self._start(len(schedule)), self.num_workers or 0, self.skipped)

    def batches(self, schedule: TrainSchedule, search: bool = False) -> TextTrainBatches:
        """Return the numbered training batches of a schedule."""
        labels = self._labels()
        weights = None if labels is None else self._class_weights(labels, int(labels.max()) + 1)
        return TextTrainBatches(self._held["train"], schedule, weights)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return the validation batches of this rank; empty if no samples were held out."""
        return self._eval("val")

    def test_dataloader(self) -> Loader | list[Loader]:
        """Return the test batches of this rank, the longest first; ``index`` has the numbers of the samples."""
        return self._eval("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the planned sample order and the samples, so that a resumed run detects another plan."""
        return {} if self.plan is None else super().state_dict() | {"samples": self._digest}

    # -- used by the application

    def summary(self) -> dict[str, Any]:
        """Return flat, JSON-ready facts about the data and the run; splits that were not read are omitted."""
        facts: dict[str, Any] = {"dataset": self.dataset, "seed": self.seed}
        facts |= {split: len(held) for split, held in self._held.items()}
        facts |= self.facts() | {self.limit: getattr(self, self.limit)}
        if "train" in self._held:
            facts |= {"tokens": self._held["train"].total, "longest": self.lengths["train"].longest}
        return facts | self.run_facts()

    def summary_lines(self, facts: dict[str, Any]) -> dict[str, str]:
        """Return the start summary's lines about the data, from the result of `summary`."""
        splits = ", ".join(f"{facts[split]:,} {split}" for split in ("train", "val", "test") if split in facts)
        absent = self._tests_read and "test" not in facts
        none = f"; none to test (no test.{self.dataset} in --data.root)" if absent else ""
        return {
            "data": f"{self.dataset}: {self.kind}{splits} samples{none}{self.notes}",
            "tokens": f"{facts['tokens']:,} for training, {facts['tokens'] / max(1, facts['train']):.0f} a sample",
            self.limit.replace("_", " "): str(self.lengths["train"]),
        }

    # -- for subclasses

    def _labels(self) -> Tensor | None:
        """Return the classes (samples,) of the training samples, or None without classes."""
        return None

    def _remember(self, texts: object) -> None:
        """Keep a checksum of the training texts for `state_dict`."""
        self._digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:12]

    def _eval(self, split: str) -> Loader | list[Loader]:
        if split not in self._held:
            return []
        held = self._held[split]
        batches = TextEvalBatches(held, self._eval_schedule(len(held)), held.by_length())
        return Loader(batches, 0, self.num_workers or 0, self.skipped)
