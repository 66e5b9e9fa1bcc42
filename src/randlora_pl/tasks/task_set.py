"""Several image tasks on one backbone: a batch whose samples have different adapters takes one forward pass."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterSet
from randlora_pl.adapters.operations import report_of
from randlora_pl.tasks.images import ImageTask, normalize
from randlora_pl.tasks.quantize import build_quantized
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import is_own

Head = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""Image tower, and the function from its features to logits."""


class TaskSet:
    """Tasks of several adapters on one backbone, each with its own head, classes and prompts. Not thread-safe.

    Args:
        first: Task with its classes, for which the backbone is built; it need not be loaded.
    """

    def __init__(self, first: ImageTask) -> None:
        model, _ = build_quantized(first.build, first.quantize, first.run.device, first.chosen_dtype())
        self.first, self.adapters = first, AdapterSet(model)
        first.backbone, first.adapters = self.adapters.model, self.adapters
        self.tasks: dict[str, ImageTask] = {}
        self._heads: dict[str, Head | None] = {}

    def load(self, name: str, task: ImageTask) -> None:
        """Load the adapter and the head of a task that was made from its file for the same base model.

        Raises:
            UserError: The name is taken, or adapter or head do not fit; the set is unchanged.
        """
        assert task.saved is not None
        if task is not self.first:
            task.identity = self.first.identity
            task.build_on(self.first)
        self.adapters.load(name, task.saved)
        try:
            task.backbone, task.adapters, task.choice = self.adapters.model, self.adapters, name
            task.report = report_of(task.model)
            task.load_head(task.saved.extra)
        except BaseException:
            self.adapters.remove(name)
            raise
        self.tasks[name] = task

    def remove(self, name: str) -> None:
        """Remove a task and its adapter."""
        self.tasks.pop(name).choice = None  # the first one stays: others are built on it
        self._heads.pop(name, None)
        self.adapters.remove(name)

    @torch.inference_mode()
    def probabilities(self, images: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Return the probabilities (classes,) of each image (b, 3, size, size) on the CPU, by the task of its name."""
        rows = {name: [row for row, each in enumerate(names) if each == name] for name in dict.fromkeys(names)}
        heads = {name: self._head(name) for name in rows}
        together = [row for row, name in enumerate(names) if heads[name] is not None]
        tower = next((head[0] for head in heads.values() if head is not None), None)
        features = images
        if tower is not None:
            self.adapters.use(None)
            try:
                with self.adapters.batched([names[row] for row in together]):
                    features = tower(images[together])
            except UserError:  # a layer mixes its samples: one adapter after the other
                heads = dict.fromkeys(rows)
        results: list[Tensor] = [images] * len(names)
        for name, own in rows.items():
            head, task = heads[name], self.tasks[name]
            if head is None:
                outputs = task.class_logits(images[own])
            else:
                outputs = head[1](features[[together.index(row) for row in own]])
            for row, each in zip(own, task.predictions(outputs).cpu(), strict=True):
                results[row] = each
        return results

    def _head(self, name: str) -> Head | None:
        """Return the head of a task; None if the task takes no part in a common forward pass."""
        if name not in self._heads:
            task = self.tasks[name].eval()
            try:
                with self.adapters.batched([name, None]):  # refuses what changes the model's own tensors
                    alone = is_own(type(task)) or not task.shares_features
            except UserError:
                alone = True
            self._heads[name] = None if alone else (task.image_tower(), _logits(task))
        return self._heads[name]


def _logits(task: ImageTask) -> Callable[[Tensor], Tensor]:
    """Return the function from features of the image tower to the logits of `class_logits`, in float32."""
    weight, second = task.head_weight().detach(), task.decoupled
    unit = task.unit_features and (second is None or second.unit_features)
    head = partial(nn.functional.linear, weight=weight) if second is None else second.classifier(weight)

    def logits(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            outputs: Tensor = head(normalize(features) if unit else features.float())
            return outputs

    return logits
