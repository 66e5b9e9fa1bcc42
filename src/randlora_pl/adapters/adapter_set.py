"""Several named adapters on one base model, switched at run time, alone or in a weighted sum."""

import itertools
import math
import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from randlora_pl.adapters.adapter_file import AdapterFile
from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.batched import Places, drop_kept, per_sample
from randlora_pl.adapters.injection import InjectionReport
from randlora_pl.adapters.layers import WeightedSum, attach
from randlora_pl.adapters.operations import adapted_layers, detach, merge, report_of, unmerge, with_bases
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.save_load import place_adapter, read_adapter
from randlora_pl.adapters.trained import base_buffers, forget_computed, moved_buffers, update_modules
from randlora_pl.utils.errors import UserError, brief, near

Choice = str | Mapping[str, float] | None
"""Name of an adapter, weights by name for a sum, or None for the base model."""


@dataclass
class _Loaded:
    report: InjectionReport
    updates: dict[str, DeltaWeight]  # by path; in the model only while the adapter is active
    own: dict[str, Tensor]  # values of the model's own tensors (full fine-tuning, BitFit, heads, statistics), by name


class AdapterSet:
    """Set of adapters that share one base model, whose weights are stored once and never change.

    While one adapter is active, the model is the same as after `load_adapter`: `merge`, `disabled`, `delta_weights`,
    `save_adapter` and the rest work, and the model has the parameters of the active adapter only. A weighted sum is
    active as W0 + sum_i w_i (W_i - W0), with gradients to each of its adapters. Adapters may differ in method, rank,
    seed and targets; equal random bases are stored once. A merged model is merged again after a switch, as far as
    possible. Not thread-safe.

    Examples:
        >>> adapters = AdapterSet(model)
        >>> cars = adapters.load("cars", "runs/cars/adapter")
        >>> pets = adapters.load("pets", "pets.safetensors")
        >>> adapters.use("cars")
        >>> adapters.use({"cars": 0.5, "pets": 0.5})
        >>> with adapters.using(None):  # the base, and back
        ...     logits = model(images)

    Args:
        model: Base model, without an adapter; its parameters are frozen.

    Raises:
        UserError: The model already has adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(model, "adapter_report", None) is not None or adapted_layers(model):
            raise UserError(
                "the model already has adapters. Start from the base model and load each adapter into the set."
            )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = model
        self._loaded: dict[str, _Loaded] = {}
        self._active: dict[str, float] = {}
        self._base: dict[str, Tensor] = {}  # the base's own tensors that an active adapter replaces
        self._merged = False  # state when the model last had adapted layers
        self._batched = False
        self._places: dict[Hashable, Places] = {}  # of samples in the inputs of layers, by call of the model

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in loading order."""
        return list(self._loaded)

    @property
    def active(self) -> dict[str, float]:
        """Active adapters and their weights: ``{"cars": 1.0}`` for one, empty for the base."""
        return dict(self._active)

    @torch.inference_mode(False)
    def load(self, name: str, adapter: str | os.PathLike[str] | AdapterFile) -> AdapterFile:
        """Load an adapter under a name, without activating it.

        Args:
            name: Name of the adapter in the set.
            adapter: Adapter folder, ``.safetensors`` file, or result of `read_adapter`.

        Returns:
            The adapter file, with its head and metadata.

        Raises:
            UserError: The name is taken, or the adapter does not fit; every mismatch is named, nothing is changed.
        """
        if name in self._loaded:
            raise UserError(f"an adapter {name!r} already exists. Call remove({name!r}) first, or use another name.")
        file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
        with self.using(None):
            there = {**dict(self.model.named_parameters()), **base_buffers(self.model)}
            chosen = {path: tensor for path, tensor in there.items() if path in file.tensors}
            base = {path: tensor.data for path, tensor in chosen.items()}
            for tensor in chosen.values():
                tensor.data = tensor.data.clone()
            try:
                place_adapter(self.model, file)
                report = report_of(self.model)
                updates = {
                    path: layer.delta for path, layer in adapted_layers(self.model).items() if layer.delta is not None
                }
                own = {path: tensor.data for path, tensor in chosen.items()}
            finally:
                for path, tensor in chosen.items():
                    tensor.data = base[path]
                    tensor.requires_grad_(False)
                detach(self.model)
        for update in updates.values():
            update.eval()  # for prediction; set_train_mode(model) is for training
        known = {_key(bases): bases for loaded in self._loaded.values() for bases in _bases_in(loaded.updates).values()}
        for holder, bases in _bases_in(updates).items():  # equal bases are stored once
            holder.bases = known.setdefault(_key(bases), bases)
        self._loaded[name] = _Loaded(report, updates, own)
        return file

    @torch.inference_mode(False)
    def replace(self, name: str, adapter: str | os.PathLike[str] | AdapterFile) -> AdapterFile:
        """Copy the values of an adapter into the tensors of a loaded one, so that compiled code stays valid.

        Args:
            name: Name of the adapter in the set, active or not.
            adapter: Adapter of the same method, options and layers, as for `load`.

        Returns:
            The adapter file, with its head and metadata.

        Raises:
            UserError: The name is unknown, or the adapter has other options or layers; nothing is changed.
        """
        self._weights(name)
        file = adapter if isinstance(adapter, AdapterFile) else read_adapter(adapter)
        if file.adapter.identity() != (mine := self._loaded[name].report.adapter).identity():
            raise UserError(
                f"{file.path} contains {brief(file.adapter.describe())}, and {name!r} is {brief(mine.describe())}. "
                "Load it under another name."
            )
        with self.using(name):
            place_adapter(self.model, file)
        return file

    def remove(self, name: str) -> None:
        """Remove an adapter from the set; if it is active, switch to the base.

        Raises:
            UserError: The name is unknown.
        """
        self._weights(name)
        if name in self._active:
            self.use(None)
        del self._loaded[name]

    @torch.inference_mode(False)  # tensors that are moved or merged may take part in autograd later
    def use(self, choice: Choice) -> None:
        """Activate an adapter, a weighted sum, or the base.

        Args:
            choice: Name of an adapter, weights by name, or None for the base.

        Raises:
            UserError: A name is unknown, a weight is not finite, an adapter cannot be part of a sum, or the model was
                unloaded. The active adapters do not change then.
        """
        if self._batched:
            raise UserError("the model has an adapter for each sample of a batch. Leave the block of batched first.")
        alone = self._loaded[next(iter(self._active))] if list(self._active.values()) == [1.0] else None
        if alone is not None:  # statistics that training has changed; a sum cannot store any
            moved = self._moved()
            alone.own.update({path: _tensor(self.model, path).data for path in moved})
            self._base |= moved
        weights = self._weights(choice)
        layers = {path for path, layer in adapted_layers(self.model).items() if layer.delta is not None}
        paths = {path for name in self._active for path in self._loaded[name].updates}
        report = alone.report if alone is not None else None
        if layers != paths or getattr(self.model, "adapter_report", None) is not report:
            # the frozen weights are unknown then
            raise UserError("other code has unloaded or adapted the model. Create a new AdapterSet with a base model.")
        if weights == self._active:
            return
        before = self._active
        self._leave()
        merged = self._merged
        try:
            self._enter(weights)
        except UserError:  # a weight that is not finite cannot be merged
            self._leave()
            self._merged = merged
            self._enter(before)
            raise

    @contextmanager
    def using(self, choice: Choice) -> Iterator[nn.Module]:
        """Activate an adapter, a sum or the base inside a ``with`` block, and restore the previous choice.

        Raises:
            UserError: See `use`.
        """
        before = self._active
        self.use(choice)
        try:
            yield self.model
        finally:
            self.use(before)

    @contextmanager
    def batched(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Activate an adapter for each sample of a batch inside a ``with`` block, and restore the previous choice.

        The outputs are as with each sample's adapter alone, up to rounding. A frozen weight is multiplied once for all
        samples. Updates of thin factors (LoRA and others) and RandLoRA's with equal bases are applied together. Others,
        and updates of convolutions, are applied by adapter. It is for prediction: gradients are off, and compiled code
        is not used.

        Each tensor whose first dimension is the number of names has one sample per row. The first call with inputs of
        another shape also calls the base model with one sample and with two, to find the samples inside the model.

        Examples:
            >>> adapters.model.eval()
            >>> with adapters.batched(["cars", "pets", None]) as model:
            ...     features = model(images[:3])

        Args:
            names: Name of the adapter of each sample, None for the base model.

        Raises:
            UserError: A name is unknown, the model is in training mode, an adapter changes the model's own tensors, or
                a layer only builds a weight. In the block: a call compares samples with one another, or the samples are
                not found in the input of an adapted layer.
        """
        if isinstance(names, str) or not names or not all(isinstance(name, str | None) for name in names):
            raise UserError("batched takes a list with the name of an adapter, or None, for each sample.")
        distinct = dict.fromkeys(names)
        for name in distinct:
            self._weights(name)
            if len(distinct) > 1 and name is not None and self._loaded[name].own:
                raise UserError(
                    f"{name!r} ({self._loaded[name].report.adapter.method()}) changes the model's own tensors, so one "
                    f"batch cannot have other adapters as well. Keep its head outside the model, or use it alone: "
                    f"adapters.use({name!r})."
                )
        if any(module.training for module in {*self.model.modules()} - update_modules(self.model)):
            raise UserError("batched is for prediction, and the model is in training mode. Call model.eval() first.")
        alone = next(iter(distinct)) if len(distinct) == 1 else None
        compiled = "torch._dynamo" in sys.modules  # if not, nothing is, and the import takes seconds
        stance = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with self.using(alone), torch.no_grad(), stance:
            if len(distinct) < 2:
                yield self.model
                return
            updates = {name: self._loaded[name].updates if name is not None else {} for name in distinct}
            for own in updates.values():
                self._move(own)
                for update in own.values():
                    if update.training:  # its training ended in another adapter's evaluation
                        update.eval()
            self._batched = True
            try:
                with per_sample(self.model, [updates[name] for name in names], self._places):
                    yield self.model
            finally:
                self._batched = False

    def _weights(self, choice: Choice) -> dict[str, float]:
        """Return the nonzero weights of a choice, checked."""
        weights = {choice: 1.0} if isinstance(choice, str) else dict(choice or {})
        for name, weight in weights.items():
            if name not in self._loaded:
                names = ", ".join(self._loaded) or "none"
                raise UserError(f"adapter {name!r} is not loaded. Loaded: {names}.{near(name, self._loaded)}")
            if not math.isfinite(weight):
                raise UserError(f"the weight of the adapter {name!r} is {weight}. Pass a finite number.")
        weights = {name: float(weight) for name, weight in weights.items() if weight}
        for name in weights if list(weights.values()) != [1.0] else ():
            if self._loaded[name].own:
                method = self._loaded[name].report.adapter.method()
                raise UserError(
                    f"{name!r} ({method}) changes the model's own tensors. Use it alone with weight 1, or write the "
                    "sum with randlora-pl adapter add (scaled: randlora-pl adapter merge --scale)."
                )
        return weights

    def _move(self, updates: Mapping[str, DeltaWeight]) -> None:
        """Move updates to the devices of their layers."""
        for path, update in updates.items():
            device = next(self.model.get_submodule(path).parameters()).device
            tensors = itertools.chain(update.parameters(), update.buffers())
            if any(tensor.device != device for tensor in tensors):  # a move drops the copies of bases
                update.to(device)

    def _leave(self) -> None:
        """Remove the active adapters from the model and restore the base exactly."""
        layers = [layer for layer in adapted_layers(self.model).values() if layer.delta is not None]
        mergeable = [layer for layer in layers if layer.obstacle() is None]
        self._merged = any(layer.merged for layer in mergeable) if mergeable else self._merged
        for path, tensor in self._moved().items():
            _tensor(self.model, path).data = tensor
        unmerge(self.model)
        detach(self.model)
        for name in self._active:
            drop_kept(self._loaded[name].updates.values())  # not a sum, which has a mode of its own
            own = self._loaded[name].own
            for path in own:
                tensor = _tensor(self.model, path)
                own[path], tensor.data = tensor.data, self._base[path].to(tensor.device)
                tensor.requires_grad_(False)
        self._base, self._active = {}, {}
        forget_computed(self.model)

    def _moved(self) -> dict[str, Tensor]:
        """Return copies of the base's statistics that training in the set has changed."""
        if not self._active:
            return {}
        before = self._loaded[next(iter(self._active))].report.buffers
        moved = moved_buffers(self.model, before)
        return {path: before[path].to(tensor, copy=True) for path, tensor in moved.items() if path not in self._base}

    def _enter(self, weights: dict[str, float]) -> None:
        """Attach adapters to the base."""
        self._active = weights
        parts: dict[str, list[tuple[DeltaWeight, float]]] = {}
        for name, weight in weights.items():
            for path, update in self._loaded[name].updates.items():
                parts.setdefault(path, []).append((update, weight))
            for path, tensor in self._loaded[name].own.items():
                there = _tensor(self.model, path)
                self._base[path], there.data = there.data, tensor.to(there.device)
                there.requires_grad_(isinstance(there, nn.Parameter))
        forget_computed(self.model)
        alone = list(weights.values()) == [1.0]
        updates = {path: here[0][0] if alone else WeightedSum(*zip(*here, strict=True)) for path, here in parts.items()}
        self._move(updates)
        if updates:  # else packed layers would not be plain
            attach(self.model, updates)
        if alone:
            self.model.adapter_report = self._loaded[next(iter(weights))].report  # type: ignore[assignment]
        if self._merged:
            merge(self.model, strict=False)


def _tensor(model: nn.Module, path: str) -> Tensor:
    module, _, name = path.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), name)
    return tensor


def _bases_in(updates: Mapping[str, DeltaWeight]) -> dict[nn.Module, Bases]:
    """Return the random bases of updates, by the module that uses them."""
    return with_bases(module for update in updates.values() for module in update.modules())


def _key(bases: Bases) -> tuple[object, ...]:
    """Return a key that is equal for equal bases; bases without a fingerprint (meta device) are never equal."""
    return bases.fingerprint or id(bases), bases.A.dtype, bases.B.dtype, bases.scale
