"""Several image tasks on one backbone: a batch whose samples have different adapters takes one forward pass."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterSet
from randlora_pl.adapters.operations import report_of
from randlora_pl.tasks.images import ImageTask, normalize
from randlora_pl.tasks.quantize import build_quantized
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import is_own


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
        self._heads: dict[str, nn.Module | None] = {}
        self._tower: nn.Module | None = None

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
        shared = [row for row, name in enumerate(names) if self.head(name) is not None]
        features: dict[int, Tensor] = {}
        if shared:
            self._tower = self._tower or self.tasks[names[shared[0]]].image_tower()
            self.adapters.use(None)
            # Refused if a layer mixes its samples; then one adapter follows the other.
            with suppress(UserError), self.adapters.batched([names[row] for row in shared]):
                features = dict(zip(shared, self._tower(images[shared]), strict=True))
        results: dict[int, Tensor] = {}
        for name in dict.fromkeys(names):
            task, own = self.tasks[name], [row for row, each in enumerate(names) if each == name]
            if own[0] in features:
                outputs = self._logits(name, torch.stack([features[row] for row in own]))
            else:
                outputs = task.class_logits(images[own])
            results |= zip(own, task.predictions(outputs).cpu(), strict=True)
        return [results[row] for row in range(len(names))]

    def head(self, name: str) -> nn.Module | None:
        """Return the module from features to logits; None if a task takes no part in a common forward pass."""
        if name not in self._heads:
            task = self.tasks[name].eval()
            try:
                with self.adapters.batched([name, None]):  # refuses what changes the model's own tensors
                    shares = task.shares_features and not is_own(type(task))
            except UserError:
                shares = False
            self._heads[name] = task.feature_head() if shares else None
        return self._heads[name]

    def _logits(self, name: str, features: Tensor) -> Tensor:
        """Return the logits of `class_logits` in float32, also under autocast."""
        task, head = self.tasks[name], self._heads[name]
        assert head is not None
        unit = task.unit_features and (task.decoupled is None or task.decoupled.unit_features)
        with torch.autocast(features.device.type, enabled=False):
            outputs: Tensor = head(normalize(features) if unit else features.float())
            return outputs
