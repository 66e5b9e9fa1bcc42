"""Base of the data modules of texts: encoded once, then handed over in numbered batches."""

from typing import Any

from torch import Tensor

from randlora_pl.data.base import PlannedData
from randlora_pl.data.loading.loader import Loader
from randlora_pl.data.sampling.schedule import total_draws
from randlora_pl.data.validate import check_run
from randlora_pl.language.data.batches import EvalBatches, Samples, TrainBatches
from randlora_pl.language.models.tokenization import pad_id
from randlora_pl.utils.errors import UserError


class TokenData(PlannedData):
    """Base of the data modules of texts. Subclasses read and encode.

    Args:
        options: Options of all data, see `PlannedData`.

    Attributes:
        usual_epochs: Default number of passes over the training samples.
        pad: Number to pad with, after `setup`.
    """

    usual_epochs = 3
    dataset: str

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        sizes, length = (self.batch_size, self.eval_batch_size), (self.epochs, self.steps)
        check_run(*sizes, *length, 0, self.sampling, self.num_workers)
        self._tokenizer: Any = None
        self._held: dict[str, Samples] = {}  # encoded samples by split
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

    # -- what Lightning calls

    def setup(self, stage: str | None = None) -> None:
        """Read and encode what the stage needs, and plan the draws.

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
        if stage in ("fit", None):
            self._plan(len(self._held["train"]), self._draws(), self._labels())

    def train_dataloader(self) -> Loader:
        """Return the training batches of this rank, from the trainer's optimizer step on."""
        schedule = self._schedule()
        labels = self._labels()
        weights = None if labels is None else self._class_weights(labels, int(labels.max()) + 1)
        batches = TrainBatches(self._held["train"], schedule, weights)
        return Loader(batches, self._start(len(schedule)), self.num_workers or 0, self.skipped)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Return the validation batches of this rank; empty if no samples were held out."""
        return self._eval("val")

    def test_dataloader(self) -> Loader | list[Loader]:
        """Return the test batches of this rank, the longest first; ``index`` has the numbers of the samples."""
        return self._eval("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the planned draws and the samples, so that a resumed run notices when it continues another plan."""
        return {} if self.plan is None else super().state_dict() | {"samples": self._digest}

    # -- for subclasses

    def _labels(self) -> Tensor | None:
        """Return the classes (samples,) of the training samples, or None without classes."""
        return None

    def samples_in_words(self, facts: dict[str, Any]) -> str:
        """Return the sizes of the splits as text, and a note if no test samples were found."""
        splits = ", ".join(f"{facts[split]:,} {split}" for split in ("train", "val", "test") if split in facts)
        none = self._tests_read and "test" not in facts
        return f"{splits} samples" + (f"; none to test (no test.{self.dataset} in --data.root)" if none else "")

    def _draws(self) -> int:
        if self.steps is not None:
            return self.steps * self.window
        return total_draws(len(self._held["train"]), self.epochs or self.usual_epochs, self.window)

    def _eval(self, split: str) -> Loader | list[Loader]:
        if split not in self._held:
            return []
        held = self._held[split]
        batches = EvalBatches(held, self._eval_schedule(len(held)), held.by_length())
        return Loader(batches, 0, self.num_workers or 0, self.skipped)
