"""How every task evaluates: on merged weights, once over all classes, each sample counted once."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from randlora_pl.adapters import merge, unmerge


class EvaluatedModule(LightningModule):
    """Validation and test of a classifier with an adapter.

    Attributes:
        test_name: Prefix of the figures of a test, ``test`` or, before training, ``zeroshot``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.test_name = "test"
        self.metrics = nn.ModuleDict()

    @property
    def model(self) -> nn.Module:
        """The backbone with its adapter."""
        raise NotImplementedError

    def class_logits(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) to (b, classes), for evaluation and prediction."""
        raise NotImplementedError

    def set_meters(self, classes: int) -> None:
        """Makes the running figures of validation and test for this many classes."""
        for stage in ("val", "test"):
            accuracy = MulticlassAccuracy(classes, average="micro")
            self.metrics[f"{stage}_meters"] = MetricCollection({"loss": MeanMetric(), "acc": accuracy})

    def meters(self, stage: str) -> MetricCollection:
        """Running loss and accuracy of ``val`` or ``test``."""
        collection = self.metrics[f"{stage}_meters"]
        assert isinstance(collection, MetricCollection)
        return collection

    def prepare_evaluation(self) -> None:
        """Merges the adapter; subclasses prepare what all batches share."""
        merge(self.model)

    def finish_evaluation(self) -> None:
        """Restores the frozen weights."""
        unmerge(self.model)

    def on_validation_epoch_start(self) -> None:
        """Prepares the evaluation."""
        self.prepare_evaluation()

    def on_test_epoch_start(self) -> None:
        """Prepares the evaluation."""
        self.prepare_evaluation()

    def on_predict_epoch_start(self) -> None:
        """Prepares the evaluation."""
        self.prepare_evaluation()

    def on_validation_epoch_end(self) -> None:
        """Ends the evaluation."""
        self.finish_evaluation()

    def on_test_epoch_end(self) -> None:
        """Ends the evaluation."""
        self.finish_evaluation()

    def on_predict_epoch_end(self) -> None:
        """Ends the evaluation."""
        self.finish_evaluation()

    def evaluate(self, batch: dict[str, Any], stage: str, name: str) -> dict[str, Tensor]:
        """Updates and logs loss and accuracy of the samples that count (weight above zero)."""
        logits = self.class_logits(batch["image"]).float()
        counts, meters = batch["weight"] > 0, self.meters(stage)
        labels = batch["label"]
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        if counts.any():
            meters["loss"].update(losses[counts])
            meters["acc"].update(logits[counts], labels[counts])
        for key, metric in meters.items():
            self.log(f"{name}/{key}", metric, on_step=False, on_epoch=True, prog_bar=stage == "val")
        return {"logits": logits, "label": labels, "index": batch["index"], "weight": batch["weight"]}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss and accuracy on the validation split."""
        return self.evaluate(batch, "val", "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Loss and accuracy on the test split."""
        return self.evaluate(batch, "test", self.test_name)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Probability of each class, (b, classes) float32; NaN for images that were skipped or only fill a batch.

        Args:
            batch: Of the data module's test images, or of `randlora_pl.data.open_images`.
            batch_idx: Its number.
        """
        counts = batch["weight"] > 0 if "weight" in batch else batch["readable"]
        shares = self.class_logits(batch["image"]).float().softmax(1)
        return shares.masked_fill(~counts[:, None], float("nan"))
