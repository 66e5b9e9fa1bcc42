"""Imported adapters: a task if there is a head or class names, or the model is a decoder, else the update alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import save_adapter
from randlora_pl.adapters.trained import hash_weights
from randlora_pl.interop.base_model import Base
from randlora_pl.interop.external import ExternalAdapter
from randlora_pl.interop.peft.files import TASK, PeftAdapter
from randlora_pl.models import ImageTower
from randlora_pl.tasks import AdaptationTask, ImageTask
from randlora_pl.tasks.restore import adopting, named_task
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import base_arguments

TEMPLATES = ["a photo of a {}."]
"""Prompts of an imported text head without prompts."""


@dataclass(frozen=True)
class ImportPlan:
    """Plan for saving an imported adapter.

    ``task`` is None for the update alone; ``arguments`` are its constructor's, besides an image model, the adapter and
    its targets. ``note`` is for the user, about tensors that were not converted.
    """

    foreign: ExternalAdapter
    base: Base
    task: type[AdaptationTask] | None = None
    classnames: list[str] = field(default_factory=list)
    head: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    templates: list[str] = field(default_factory=lambda: TEMPLATES)
    note: str = ""

    @classmethod
    def make(
        cls, foreign: ExternalAdapter, base: Base, adapter: PeftAdapter | None, name: str | None, classnames: list[str]
    ) -> "ImportPlan":
        """Choose the task: as requested, by the saved head, or by the adapted towers if there are class names.

        Raises:
            UserError: The requested task does not fit the model, the head or the class names.
        """
        head, saved = (adapter.head, adapter.task) if adapter is not None else ({}, {})
        task, kept = named_task(name), named_task(saved.get("task"))
        classnames = classnames or list(saved.get("classnames", []))
        extra, note = foreign.extra, ""
        weights = [tensor for name, tensor in extra.items() if name.endswith("weight") and tensor.dim() == 2]
        biases = [tensor for name, tensor in extra.items() if name.endswith("bias")]
        if extra and (len(weights) != 1 or len(extra) != 1 + len(biases)):
            note = f"Trained completely and kept as extra tensors: {', '.join(extra)}.\n"
        elif any(bool(torch.count_nonzero(bias)) for bias in biases):
            note = "The head has a bias, which LinearHeadTask does not support; kept as extra tensors: "
            note += f"{', '.join(extra)}.\n"
        elif extra and base.identity is not None and base.identity.library == "timm":
            head, kept = {"head": weights[0].float()}, adopting("linear head")
        clip = base.identity is not None and base.identity.library == "open_clip"
        if task is None and kept is not None and issubclass(kept, ImageTask):
            task = kept
        elif task is None and clip and len(classnames) > 1:
            visual = all(layer.startswith("visual.") for layer in foreign.layers)
            task = adopting("image tower" if visual else "both towers")
        if task is None:
            return cls(foreign, base, note=note)
        name, linear = task.__name__, task.adopts == "linear head"
        if not linear and not clip:
            raise UserError(f"--task {name} needs a CLIP model with a text tower; this one has none.")
        if linear and "head" not in head:
            raise UserError(f"--task {name} needs a head, and the adapter has none that fits." + note)
        if linear and not classnames:
            classnames = [f"class {number}" for number in range(len(head["head"]))]
        if "head" in head and len(head["head"]) != len(classnames):
            raise UserError(f"the head has {len(head['head'])} classes, and there are {len(classnames)} class names.")
        if len(classnames) < 2:
            raise UserError(f"--task {name} needs class names. Add --classnames FILE, with one name per line.")
        if task != kept:
            return cls(foreign, base, task, classnames, note=note)
        arguments = dict(saved.get("arguments", {}))
        return cls(foreign, base, task, classnames, head, arguments, saved.get("templates", TEMPLATES), note)

    def save(self, ours: nn.Module, path: Path) -> Path:
        """Save the base model's adapter, as its task does if there is one.

        Raises:
            UserError: The task has no place for a tensor, or other arguments.
        """
        identity, foreign = self.base.identity, self.foreign
        assert identity is not None
        if self.task is None:
            return save_adapter(ours, path, base_model=identity.as_dict(), extra=foreign.extra)
        options = {**self.arguments, "adapter": foreign.adapter, "targets": foreign.targets}
        kind: Any = self.task
        if self._is_decoder:
            if foreign.extra:
                raise UserError(
                    f"{foreign.source}: {next(iter(foreign.extra))} is not an update, and a decoder has no head."
                )
        else:
            here = base_arguments(identity.as_dict(), path)
            options |= {"name": identity.name, "pretrained": identity.pretrained, "seed": identity.seed or 0} | here
        check_arguments(kind, self.arguments, f"{foreign.source}, {TASK}")
        task = kind(**options)
        if not self._is_decoder:
            task.set_classes(self.classnames, self.templates)
        task.configure_model()
        foreign.fill(task.model)
        if self.head:
            task.load_head(self.head)
        written: Path = task.save(path)
        return written

    @property
    def _is_decoder(self) -> bool:
        return self.task is not None and self.task.adopts == "decoder"

    def next(self, path: Path) -> str:
        """Return the next command to run."""
        if self.task:
            inputs = "--texts FILE" if self._is_decoder else "--images FOLDER"
            return f"Next: randlora-pl predict --adapter {path} {inputs}"
        merge = f"randlora-pl adapter merge {path} --output FILE"
        return f"{self.note}Next: {merge}; or, in Python: load_adapter(model, {str(path)!r})"


def load_decoder(name: str, pretrained: str | None, saved: Mapping[str, Any]) -> tuple[Base, dict[str, Any]]:
    """Build a decoder of transformers, and return it with the arguments of its task.

    Args:
        name: Hub id or folder.
        pretrained: Folder with its weights, or ``random``.
        saved: Arguments of the task it was exported from; empty if unknown.

    Raises:
        UserError: The model is not available, or the arguments do not belong to the task.
    """
    kind = adopting("decoder")
    check_arguments(kind, saved, TASK)
    arguments = {**saved, "name": name, "pretrained": pretrained, "quantize": None}
    task = kind(**arguments)
    model = task.build()
    return Base(model, model, task.identity), arguments


def check_base(adapter: PeftAdapter, base: Base) -> None:
    """Check the weights' hash stored with the adapter against the base model; PEFT's own adapters have none.

    Raises:
        UserError: Neither the model nor its image tower matches the hash.
    """
    named = adapter.task.get("base_model") or {}
    wanted = named.get("weights_sha256_sampled")
    parts = [base.model, *([ImageTower(base.model)] if hasattr(base.model, "visual") else [])]
    if wanted and wanted not in (found := [hash_weights(part) for part in parts]):
        words = " ".join(str(named[key]) for key in ("name", "pretrained", "seed") if named.get(key) is not None)
        raise UserError(
            f"{adapter.path} was trained on other weights ({words}, {str(wanted)[:12]}) than --model and "
            f"--pretrained ({found[0][:12]}). Use its own base model."
        )
