"""Zero-shot tests: of the base model before the training, and on other datasets, which shows what was forgotten."""

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from randlora_pl.adapters import disabled
from randlora_pl.data.loading.chosen_images import batches, framed, random_samples
from randlora_pl.models import encode_prompts
from randlora_pl.models.zero_shot import zero_shot_accuracy
from randlora_pl.utils.errors import UserError


class ZeroShot(Callback):
    """Disable the adapter during a test; methods that train the base weights have nothing to disable."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Disable the adapter before weights are merged."""
        if not pl_module.adapter.trains_base:
            self._stack.enter_context(disabled(pl_module.model))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enable the adapter after weights are restored."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model."""
        self._stack.close()


class Elsewhere(Callback):
    """Log zero-shot accuracies on other datasets in each test, as ``test/elsewhere/NAME``, with the task's caption.

    The test of the pretrained model logs ``zeroshot/elsewhere/NAME``; the difference is what the training has changed.
    Needs a ``VisionLanguageTask`` or ``PromptTask``. Name it in ``--trainer.callbacks``. For finished runs there is
    ``randlora-pl analyze forgetting``.

    Args:
        datasets: Names of datasets with classes, in the data folder of the run. The training dataset is left out.
        images: Test images of each, a random choice that is the same in all runs; 0 for all.
    """

    def __init__(self, datasets: list[str], images: int = 1000) -> None:
        self.datasets, self.images = list(datasets), images

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Refuse tasks without a text tower that names classes."""
        if not (hasattr(pl_module, "caption") or hasattr(pl_module, "features_of")):
            raise UserError(
                f"Elsewhere: {type(pl_module).__name__} cannot name the classes of other datasets. Remove the "
                "callback, or use VisionLanguageTask or PromptTask."
            )

        prompts = getattr(pl_module, "prompts", None)
        if prompts is not None and (prompts.per_image or prompts.class_specific):
            raise UserError(f"Elsewhere: these prompts ({prompts!r}) cannot name other classes. Remove the callback.")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure on the evaluated weights, before the task restores the frozen ones."""
        task, own = pl_module, trainer.datamodule  # type: ignore[attr-defined]
        for name in self.datasets:
            if name == own.row.name:
                continue
            options = {"dataset": name, "root": str(own.root), "num_workers": own.num_workers}
            data = framed(options, task.image_spec, own.eval_batch_size)
            data.setup("test")
            samples = random_samples(data.samples("test"), self.images or None, 0)
            prompted = hasattr(task, "features_of")
            classes = (
                task.features_of(data.classnames)
                if prompted
                else encode_prompts(task.model, task.tokenizer, data.classnames, [task.caption], task.device)
            )
            found = batches(data, samples, own.eval_batch_size, task.device)
            (percent,), _ = zero_shot_accuracy(task.as_encoder() if prompted else task.model, classes[None], found)
            task.log(f"{task.test_name}/elsewhere/{name}", percent / 100, sync_dist=False, rank_zero_only=False)
