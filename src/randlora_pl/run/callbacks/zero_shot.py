"""Zero-shot tests: of the base model before the training, and on other datasets or classes after it."""

from contextlib import ExitStack
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.adapters import disabled
from randlora_pl.data import ImageData
from randlora_pl.data.catalog import find
from randlora_pl.data.unlabelled import batches, framed, random_samples
from randlora_pl.tasks.module import AdaptationModule, own_module
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Declared, NotNegative

if TYPE_CHECKING:
    from randlora_pl.tasks.images import ClipTask


class ZeroShot(Callback):
    """Disable the adapter during a test; methods that train the base weights have nothing to disable."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Disable the adapter before weights are merged."""
        task = own_module(pl_module).objective
        if not task.adapter.trains_base:
            self._stack.enter_context(disabled(task.model))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enable the adapter after weights are restored."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model."""
        self._stack.close()


class _ByName(Declared, Callback):
    """Base of tests on classes that a task did not train on, and for which it needs their names alone."""

    images: Annotated[int, NotNegative] = 0
    """Test images of each dataset, a random choice that is the same in all runs; 0 for all."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse tasks without a text tower that names classes."""
        task = own_module(pl_module).objective
        if not task.compares_names:
            raise UserError(
                f"{type(self).__name__}: {type(task).__name__} cannot name other classes. Remove the callback, "
                "or use VisionLanguageTask or PromptTask."
            )
        prompts = getattr(task, "prompts", None)
        if prompts is not None and prompts.class_specific:
            raise UserError(f"{type(self).__name__}: {prompts!r} cannot name other classes. Remove the callback.")

    def measure(self, module: AdaptationModule, options: dict[str, Any], key: str) -> None:
        """Log the accuracy on the test images of other data, with the preprocessing of the task's own data."""
        task = cast("ClipTask", module.objective)
        own = task.run.data
        assert own is not None
        options |= {"root": str(own.root), "num_workers": own.num_workers}
        data = framed(options, own.frame, own.eval_batch_size)
        data.setup("test")
        samples = random_samples(data.samples("test"), self.images or None, 0)
        images = batches(data, samples, own.eval_batch_size, task.device)
        with task.run.autocast():  # as the test's own batches
            percent, _ = task.percent_among(data.classnames, images, templates=data.templates)
        module.log(f"{module.test_name}/{key}", percent / 100, sync_dist=False, rank_zero_only=False)


class Elsewhere(_ByName):
    """Log zero-shot accuracies on other datasets in each test, as ``test/elsewhere/NAME``.

    Its prompts are the task's caption or typed prompts, else the dataset's. The test of the pretrained model logs
    ``zeroshot/elsewhere/NAME``; the difference is what the training has changed.
    Needs a ``VisionLanguageTask`` or ``PromptTask``. Name it in ``--trainer.callbacks``. With ``--data.split coop``,
    the other datasets have CoOp's split as well if there is one. For finished runs there is ``randlora-pl analyze
    forgetting``.
    """

    datasets: list[str] = field(kw_only=False)
    """Names of datasets with classes, in the data folder of the run. The training dataset is left out."""
    images: Annotated[int, NotNegative] = 1000
    """Test images of each, a random choice that is the same in all runs; 0 for all."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the evaluated weights, before the task restores the frozen ones."""
        own: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        for name in self.datasets:
            if name != own.row.name:
                split = own.split if find(name).coop is not None else "default"
                self.measure(own_module(pl_module), {"dataset": name, "split": split}, f"elsewhere/{name}")


class NewClasses(_ByName):
    """Log the accuracy on the classes that ``--data.classes base`` leaves out, as ``test/new/acc``.

    The new classes are compared with each other, as the base classes in the test itself. The test of the pretrained
    model logs ``zeroshot/new/acc``. Needs a ``VisionLanguageTask`` or ``PromptTask``. Name it in
    ``--trainer.callbacks``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data without new classes."""
        super().setup(trainer, pl_module, stage)
        if trainer.datamodule.classes == "all":  # type: ignore[attr-defined]
            raise UserError("NewClasses: the training has all classes. Set --data.classes base, or remove it.")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure on the evaluated weights, before the task restores the frozen ones."""
        own: ImageData = trainer.datamodule  # type: ignore[attr-defined]
        if own.classes == "base":
            options: dict[str, Any] = {"dataset": own.row.name, "split": own.split, "classes": "new"}
            options |= {"templates": own_module(pl_module).objective.templates, "classnames": own.classnames_file}
            self.measure(own_module(pl_module), options, "new/acc")
