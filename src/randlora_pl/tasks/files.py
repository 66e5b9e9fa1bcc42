"""Names of tasks in files, and the part of a task that stores it: adapter folders, and checkpoints of what trains."""

import hashlib
import json
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from randlora_pl.adapters import save_adapter
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.adapters.operations import rates_of
from randlora_pl.adapters.save_load import check_loads_again, make_adapter
from randlora_pl.adapters.trained import kept_buffers, reset_buffers, update_buffers
from randlora_pl.tasks.optim import Optimization
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import option_types
from randlora_pl.utils.own_classes import check_importable, is_own, parent_among, path_of


def check_tensors(given: Mapping[str, Tensor], own: Mapping[str, Tensor], needed: Collection[str], what: str) -> None:
    """Refuse given tensors if a needed one is missing, or one is unknown or has another shape than the own one."""
    missing, unknown = sorted(set(needed) - given.keys()), sorted(given.keys() - own.keys())
    if missing or unknown:
        raise UserError(f"{what} does not fit: missing {missing[:3]}, unexpected {unknown[:3]}.")
    for name, value in given.items():
        if value.shape != own[name].shape:
            there, here = tuple(value.shape), tuple(own[name].shape)
            raise UserError(f"{what} does not fit: {name} has shape {there} there and {here} here.")


def rooms() -> list[ModuleType]:
    """Return the packages that export tasks."""
    return [import_module(f"randlora_pl.{name}") for name in ("tasks", "language")]


def task_names() -> frozenset[str]:
    """Return the names of the classes of this program that a task can have."""
    return frozenset(name for room in rooms() for name in room.__all__) - {"AdaptationTask", "HeadTask", "ImageTask"}


def kind_of(kind: type) -> str:
    """Return the name of a task's class; from outside, the name of its nearest parent here, or its import path."""
    return parent_among(kind, task_names()) or path_of(kind)


class Stored(Optimization):
    """Adapter folders, and checkpoints that hold only what trains."""

    def load_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `head_tensors` back from an adapter folder; refuse tensors that do not fit."""
        own = self.head_tensors()
        check_tensors(tensors, own, own.keys(), "the head")
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(tensors[name])

    def start_head(self) -> None:
        """Load the trained head of the LoRA that a training starts from, if the task has one.

        Raises:
            UserError: The file has no head of this kind, or one for other classes.
        """
        if self.start is None or not self.trained_head:
            return
        file = self.start.file
        theirs, kind, own = file.metadata.get("classnames"), file.metadata.get("task"), kind_of(type(self))
        if kind != own:
            raise UserError(f"{file.path} is of {kind}, and has no head for {own}. Set --model {kind}.")
        if theirs != self.classnames:
            raise UserError(
                f"the head of {file.path} is for {len(theirs or [])} classes, and fits no others: here are "
                f"{len(self.classnames)}. Name the data of the LoRA by --data.dataset and --data.root."
            )
        self.load_head(file.extra)

    def constructor(self) -> dict[str, Any]:
        """Return the options as JSON values, without the adapter and the options of execution."""
        left_out = ("adapter", "frozen_dtype", "torch_compile", "liger")
        return {name: getattr(self, name) for name in option_types(type(self)) if name not in left_out}

    def check_loads_again(self) -> None:
        """Refuse a task whose file could not be loaded again.

        Raises:
            UserError: A class cannot be imported, or a file cannot hold an option.
        """
        check_loads_again(self.adapter)
        if not is_own(type(self)):
            return
        check_importable(type(self))
        try:
            json.dumps(self.constructor())
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{type(self).__name__}: options that a file cannot hold ({error}). Use numbers, texts and lists."
            ) from None

    def save(self, folder: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
        """Write the adapter folder: trained tensors, head, class names and prompts.

        A task from outside is stored as its nearest parent here, with the path of its own class.

        Args:
            folder: Folder to write; an older one is replaced at once.
            summary: Metrics of the training, kept in the metadata.
        """
        self.check_loads_again()
        arguments = self.constructor()
        if self.identity.sha256:  # without the local path of the weights
            arguments["pretrained"] = self.identity.pretrained
        if self.identity.config_sha256:  # without the local path of the folder
            arguments["name"] = self.identity.name
        metadata = {
            "task": kind_of(type(self)),
            **({"task_class": path_of(type(self))} if is_own(type(self)) else {}),
            "arguments": arguments,
            "classnames": self.classnames,
            "templates": self.templates,
            "typed_templates": self.typed_templates,
            "captions": self.retrieval,
            **self.metadata(),
            "training": dict(summary or {}),
        }
        base = self.identity.as_dict()
        return save_adapter(self.model, folder, base_model=base, extra=self.head_tensors(), metadata=metadata)

    def fingerprint(self) -> str:
        """Return a checksum of the base model, the bases and the state: equal in all processes of a run."""
        digest = hashlib.sha256(f"{self.report.base_hash} {self.report.fingerprint}".encode())
        for name, tensor in (self.trained_state() | self._own(derived_buffers(self.model))).items():
            value = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + value.numpy().tobytes())
        return digest.hexdigest()

    def trained_state(self) -> dict[str, Tensor]:
        """Return what trains, and the kept buffers that belong to it, by their names in the state dict."""
        return self._trained() | self._own(kept_buffers(self.model))

    def _trained(self) -> dict[str, Tensor]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def _own(self, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return buffers of the model by their names in the task's state dict."""
        wanted = {id(buffer) for buffer in buffers.values()}
        return {name: buffer for name, buffer in self.named_buffers() if id(buffer) in wanted}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains and the kept buffers, and add the adapter, the base model and derived tensors."""
        own, derived, whole = self.trained_state(), self._own(derived_buffers(self.model)), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in whole.items() if name in own and name not in derived}
        checkpoint["derived"] = {name: value.detach() for name, value in derived.items()}
        checkpoint["adapter"] = self.adapter.describe()
        checkpoint["base_model"] = self._base_model()
        checkpoint["rates"] = self._rates()
        if (procedure := self.report.procedure) is not None:
            waiting = self.procedure_state  # of a checkpoint, before the training starts
            checkpoint["procedure"] = procedure.state_dict() if waiting is None else waiting

    def _base_model(self) -> str:
        """Return name and weights of the base model as text."""
        identity = self.identity
        return f"{identity.library} {identity.name} {identity.pretrained} (weights {self.report.base_hash[:12]})"

    def _rates(self) -> dict[str, float]:
        """Return the factors of the learning rate by name, for tensors where it is not 1: they group the optimizer."""
        factors = rates_of(self.model)
        return {name: factors[each] for name, each in self.named_parameters() if factors.get(each, 1.0) != 1}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another adapter or base model, with both values, or of more steps than the run has."""
        trains = self._trainer is not None and self.trainer.state.fn == "fit"
        done = int(checkpoint.get("global_step", 0))
        if trains and getattr(self.data, "plan", None) is not None and done > self.total_steps():
            raise UserError(
                f"{done:,} steps are done; this run has only {self.total_steps():,}. "
                "Set a larger --data.steps (or --data.epochs), or start a new run."
            )
        if theirs := checkpoint.get("adapter"):
            saved = make_adapter(theirs["method"], theirs["options"], "the checkpoint")  # knows later options, too
            identities = (saved.identity(), self.adapter.identity())
            there, here = ({"method": each["method"], **each["options"]} for each in identities)
            for name, value in here.items():
                if there.get(name) != value:
                    raise UserError(
                        f"adapter.{name} is {there.get(name)} in the checkpoint and {value} in this run; "
                        "remove the option, or start a new run."
                    )
        own = self._base_model()
        base = checkpoint.get("base_model", own)
        if base.rpartition("(weights")[2] != own.rpartition("(weights")[2]:  # the same weights may lie elsewhere
            raise UserError(f"the checkpoint was trained on {base}, this run has {own}; choose the same base model.")
        before, now = checkpoint.get("rates", {}), self._rates()
        for name in [*now, *before] if trains else ():
            if before.get(name, 1.0) != now.get(name, 1.0):
                raise UserError(
                    f"{name} trains at {before.get(name, 1.0):g} times the learning rate in the checkpoint and at "
                    f"{now.get(name, 1.0):g} times in this run; give the adapter the rates of the checkpoint, or start "
                    "a new run."
                )
        checkpoint["state_dict"] |= checkpoint.get("derived") or {}
        self.procedure_state = checkpoint.get("procedure")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what trains, or a whole state, strictly; statistics that it lacks become the base model's."""
        kept = self._own(update_buffers(self.model)).keys() - self._own(derived_buffers(self.model)).keys()
        check_tensors(state_dict, self.state_dict(), self._trained().keys() | kept, "the checkpoint")
        reset_buffers(self.model)
        return super().load_state_dict(state_dict, strict=False, assign=assign)
