"""What tasks on images share: classes and their prompts, accuracy, and the test before the training."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from randlora_pl.adapters import Adapter
from randlora_pl.models import ImageSpec, library_of
from randlora_pl.tasks.base import AdaptationTask
from randlora_pl.tasks.defaults import default_learning_rate
from randlora_pl.utils.errors import UserError

MOST_CLASSES = 50_000
"""The largest published sets have 22,000; a file that says more costs minutes of encoding and a table of gigabytes."""


class ImageTask(AdaptationTask):
    """Base of the tasks on images. Subclasses say how images become class logits.

    Attributes:
        image_spec: What the backbone expects of an image; the data module asks for it.
        takes_captions: Whether the data may be captions rather than classes.
        vision_only: Whether the image tower alone trains.
        blended_labels: Whether a training label may be shares of several classes.
    """

    zero_shot = True
    takes_captions = False
    vision_only = True
    blended_labels = False
    image_spec: ImageSpec

    def class_logits(self, images: Tensor) -> Tensor:
        """(b, 3, H, W) to (b, classes), for evaluation and prediction."""
        raise NotImplementedError

    def build_on(self, other: "ImageTask") -> None:
        """What `build` does beside loading the backbone, where another task has the same one already."""
        self.identity = other.identity

    @staticmethod
    def which_weights(name: str, pretrained: str | None) -> str | None:
        """The weights of a timm model's name where none are given; fine-tuning noise must be asked for.

        Raises:
            UserError: The name says none.
        """
        if pretrained is None and name != "tiny":
            if library_of(name) == "open_clip" or "." not in name:
                raise UserError(
                    f"--model.pretrained is missing: {name} needs weights. Give a tag (`randlora-pl models` shows "
                    "some), 'timm' for a timm model, a file, or 'random'."
                )
            return "timm"  # the weights of the tag in the name
        return pretrained

    def usual_rate(self, adapter: Adapter) -> float:
        """That of Table 8 and section C.3."""
        return default_learning_rate(adapter, self.vision_only)

    def set_classes(self, classnames: list[str], templates: list[str], captions: bool = False) -> None:
        """Names the classes; Lightning's `setup` takes them from the data module.

        Args:
            classnames: Name of each class, or the captions.
            templates: Prompt templates with one ``{}`` each.
            captions: Whether the names are captions, so that recall is what counts.

        Raises:
            UserError: If there are fewer than two, or the task was built for others or cannot do with captions.
        """
        if captions and not self.takes_captions:
            raise UserError(f"{type(self).__name__} needs classes, and these are captions: use VisionLanguageTask.")
        self.retrieval = captions
        if self.backbone is not None and classnames != self.classnames:
            raise UserError(
                f"the task was built for {len(self.classnames)} classes {self.classnames[:3]}..., the data have "
                f"{len(classnames)} classes {classnames[:3]}...; make a new task."
            )
        if len(classnames) < 2:
            raise UserError(f"there is only the class {classnames}; a classifier needs two or more.")
        if len(classnames) > MOST_CLASSES and not captions:  # each is encoded, and counted against each other one
            raise UserError(f"there are {len(classnames):,} classes; at most {MOST_CLASSES:,} can be told apart.")
        self.classnames, self.templates = list(classnames), list(templates)
        self.set_meters(len(classnames))

    def setup(self, stage: str) -> None:
        """Takes class names and prompts from the data module.

        Raises:
            UserError: If there are none, or the task was built for others.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule is None and not self.classnames:
            raise UserError("the task needs a data module, or set_classes(classnames, templates) first.")
        if datamodule is not None and (self.backbone is None or datamodule.classnames != self.classnames):
            captions = getattr(getattr(datamodule, "row", None), "captions", False)
            self.set_classes(datamodule.classnames, datamodule.templates, captions)

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
