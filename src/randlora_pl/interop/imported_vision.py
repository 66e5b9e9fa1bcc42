"""What an adapter from elsewhere becomes: one that predicts, where it has a head or class names, or the bare update."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import save_adapter
from randlora_pl.adapters.io.base_hash import hash_weights
from randlora_pl.interop.base_model import Base
from randlora_pl.interop.foreign.adapter import Foreign
from randlora_pl.interop.peft.files import TASK, PeftAdapter
from randlora_pl.models import ImageTower
from randlora_pl.tasks.restore import TASKS
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.weights_files import find_weights

TEMPLATES = ["a photo of a {}."]
"""Prompts of a text head that came without any."""


@dataclass(frozen=True)
class Plan:
    """How an adapter is saved.

    Attributes:
        foreign: The adapter.
        base: Its base model.
        task: The task that it becomes, empty for the bare update.
        classnames: Names of the classes of that task.
        head: The tensors of that task's head, where it has one.
        arguments: Of the task's constructor, besides the base model, the adapter and its targets.
        templates: Prompts of a text head.
        note: What a user must know about what was left as it was.
    """

    foreign: Foreign
    base: Base
    task: str = ""
    classnames: list[str] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    templates: list[str] = field(default_factory=lambda: TEMPLATES)
    note: str = ""

    @classmethod
    def make(
        cls, foreign: Foreign, base: Base, adapter: PeftAdapter | None, task: str | None, classnames: list[str]
    ) -> "Plan":
        """Chooses the task: as asked, that of the head, or that of the towers where there are class names.

        Raises:
            UserError: The task that was asked for does not go with the model, the head or the class names.
        """
        head, saved = (adapter.head, adapter.task) if adapter is not None else ({}, {})
        kept, classnames = saved.get("task", ""), classnames or list(saved.get("classnames", []))
        weight, note = _linear_head(foreign.extra)
        if weight is not None and base.identity is not None and base.identity.library == "timm":
            head, kept = {"head": weight}, "LinearHeadTask"
        clip = base.identity is not None and base.identity.library == "open_clip"
        if task is None and kept in TASKS:
            task = kept
        elif task is None and clip and len(classnames) > 1:
            task = (
                "TextHeadTask" if all(layer.startswith("visual.") for layer in foreign.layers) else "VisionLanguageTask"
            )
        if task is None:
            return cls(foreign, base, note=note)
        if task != "LinearHeadTask" and not clip:
            raise UserError(f"--task {task} needs a CLIP model with a text tower; this one has none.")
        if task == "LinearHeadTask" and "head" not in head:
            raise UserError("--task LinearHeadTask needs a head, and the adapter has none that it could be." + note)
        if task == "LinearHeadTask" and not classnames:
            classnames = [f"class {number}" for number in range(len(head["head"]))]
        if "head" in head and len(head["head"]) != len(classnames):
            raise UserError(f"the head has {len(head['head'])} classes, and there are {len(classnames)} class names.")
        if len(classnames) < 2:
            raise UserError(f"--task {task} needs the names of its classes: --classnames FILE, one a line.")
        if task != kept:
            return cls(foreign, base, task, classnames, note=note)
        arguments = dict(saved.get("arguments", {}))
        return cls(foreign, base, task, classnames, head, arguments, saved.get("templates", TEMPLATES), note)

    def save(self, ours: nn.Module, path: Path) -> Path:
        """Writes the adapter.

        Args:
            ours: The base model with the adapter.
            path: A folder, or one file.
        """
        identity = self.base.identity
        assert identity is not None
        if not self.task:
            return save_adapter(ours, path, base_model=identity.as_dict(), extra=self.foreign.extra)
        kind: Any = TASKS[self.task]
        known = find_weights(identity.as_dict(), path) or identity.pretrained
        base = {"name": identity.name, "pretrained": known, "seed": identity.seed or 0}
        adapter = {"adapter": self.foreign.adapter, "targets": self.foreign.targets}
        try:
            task = kind(**{**self.arguments, **base, **adapter})
        except TypeError as error:
            raise UserError(f"{self.foreign.source}: {TASK} has other arguments than {self.task} ({error}).") from None
        task.set_classes(self.classnames, self.templates)
        task.configure_model()
        self.foreign.fill(task.model)
        if self.head:
            task.load_head(self.head)
        written: Path = task.save(path)
        return written

    def next(self, path: Path) -> str:
        """The next command."""
        if self.task:
            return f"Next: randlora-pl predict --adapter {path} --images FOLDER"
        merge = f"randlora-pl adapter merge {path} --output FILE"
        return f"{self.note}Next: {merge}; or, in Python: load_adapter(model, {str(path)!r})"


def check_base(adapter: PeftAdapter, base: Base) -> None:
    """Refuses a base model with other weights than those that an adapter says it was trained on; PEFT's own say none.

    Raises:
        UserError: Neither the model nor its image tower has their hash.
    """
    named = adapter.task.get("base_model") or {}
    wanted = named.get("weights_sha256_sampled")
    parts = [base.model, *([ImageTower(base.model)] if hasattr(base.model, "visual") else [])]
    if wanted and wanted not in (found := [hash_weights(part) for part in parts]):
        words = " ".join(str(named[key]) for key in ("name", "pretrained", "seed") if named.get(key) is not None)
        raise UserError(
            f"{adapter.path} was trained on other weights ({words}, {str(wanted)[:12]}) than those of --model and "
            f"--pretrained ({found[0][:12]}); name its own base model."
        )


def _linear_head(extra: dict[str, Tensor]) -> tuple[Tensor | None, str]:
    """The weight of a head that LinearHeadTask can have, which is one without bias; else None and why."""
    weights = {name: tensor for name, tensor in extra.items() if name.endswith("weight") and tensor.dim() == 2}
    biases = [tensor for name, tensor in extra.items() if name.endswith("bias")]
    if not extra:
        return None, ""
    if len(weights) != 1 or len(extra) != 1 + len(biases):
        return None, f"Trained as a whole and kept as extra tensors: {', '.join(extra)}.\n"
    if any(bool(torch.count_nonzero(bias)) for bias in biases):
        return None, f"The head has a bias, which LinearHeadTask has not; kept as extra tensors: {', '.join(extra)}.\n"
    return next(iter(weights.values())).float(), ""
