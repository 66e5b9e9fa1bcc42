"""What a task writes and reads again: adapter folders, and checkpoints of what trains."""

import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from randlora_pl.adapters import Adapter, InjectionReport, save_adapter
from randlora_pl.adapters.io.save_load import make_adapter
from randlora_pl.adapters.kept import kept_buffers, reset_buffers, update_buffers
from randlora_pl.models import ModelIdentity
from randlora_pl.tasks.checkpoint import check_adapter, check_tensors
from randlora_pl.tasks.evaluation import EvaluatedModule
from randlora_pl.utils.errors import UserError


class SavedModule(EvaluatedModule):
    """Files of a module with an adapter, which hold what trains and say what it belongs to.

    Attributes:
        adapter: The method and its options.
        identity: Which base model it is, once that is built.
        report: What was adapted, once the base model is built.
        classnames: Name of each class, or the captions.
        templates: Prompt templates.
        retrieval: Whether the data are captions rather than classes, so that recall is what counts.
    """

    adapter: Adapter
    identity: ModelIdentity
    report: InjectionReport

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold what trains; load_state_dict checks that strictly
        self.retrieval = False
        self.classnames: list[str] = []
        self.templates: list[str] = []

    def head_tensors(self) -> dict[str, Tensor]:
        """Tensors beside the backbone that a prediction needs."""
        return {}

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors of `head_tensors` back from an adapter folder.

        Raises:
            UserError: If they do not fit.
        """
        own = self.head_tensors()
        check_tensors(tensors, own, own.keys(), "the head")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])

    def fingerprint(self) -> str:
        """A checksum of the base model, the bases, and every bit of the state: equal in all processes of a run."""
        digest = hashlib.sha256(f"{self.report.base_hash} {self.report.fingerprint}".encode())
        for name, tensor in self.trained_state().items():
            value = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def constructor(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values, without the adapter and how it runs: enough to build it again."""
        left_out = ("adapter", "frozen_dtype", "torch_compile")  # the last two are how it runs, not what it is
        names = [name for name in inspect.signature(type(self)).parameters if name not in left_out]
        return {name: getattr(self, name) for name in names}

    def save(self, folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
        """Writes the adapter folder: trained tensors, head, class names and prompts.

        Args:
            folder: Where to write; an older folder is replaced at once.
            summary: Figures of the training, kept in the metadata.
        """
        arguments = self.constructor()
        if self.identity.sha256:  # where the file lies is nobody's business
            arguments["pretrained"] = self.identity.pretrained
        metadata = {
            "task": type(self).__name__,
            "arguments": arguments,
            "classnames": self.classnames,
            "templates": self.templates,
            "captions": self.retrieval,
            "training": dict(summary or {}),
        }
        return save_adapter(
            self.model, folder, base_model=self.identity.as_dict(), extra=self.head_tensors(), metadata=metadata
        )

    def trained_state(self) -> dict[str, Tensor]:
        """What trains, and the kept buffers that belong to it, by their names in the state dict."""
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trained | self._own(kept_buffers(self.model))

    def _own(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Buffers of the model by their names in this module's state dict."""
        wanted = {id(buffer) for buffer in buffers.values()}
        return {name: buffer for name, buffer in self.named_buffers() if id(buffer) in wanted}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps only what trains and the kept buffers, and says what they belong to."""
        own = self.trained_state()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in own}
        checkpoint["adapter"] = self.adapter.describe()
        checkpoint["base_model"] = self._base_model()

    def _base_model(self) -> str:
        """Name and weights of the base model, in words."""
        identity = self.identity
        return f"{identity.library} {identity.name} {identity.pretrained} (weights {self.report.base_hash[:12]})"

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another adapter or base model.

        Raises:
            UserError: With both values.
        """
        if theirs := checkpoint.get("adapter"):
            saved = make_adapter(theirs["method"], theirs["options"], "the checkpoint")  # knows later options, too
            check_adapter(saved.identity(), self.adapter.identity())
        there, here = checkpoint.get("base_model", self._base_model()), self._base_model()
        if there.rpartition("(weights")[2] != here.rpartition("(weights")[2]:  # the same weights may lie elsewhere
            raise UserError(f"the checkpoint was trained on {there}, this run has {here}; choose the same base model.")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what trains, or a whole state, and complains about any name that does not fit.

        Statistics of the base model that are not in it become those that the base model came with.

        Raises:
            UserError: If a tensor that trains is missing, or one is unknown or of another shape.
        """
        needed = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        needed |= self._own(update_buffers(self.model)).keys()
        check_tensors(state_dict, self.state_dict(), needed, "the checkpoint")
        reset_buffers(self.model)
        return super().load_state_dict(state_dict, strict=False, assign=assign)
