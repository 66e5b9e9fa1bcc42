"""Several adapters on one base model: named, switched at run time, one at a time or in a weighted sum."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.inject import InjectionReport
from randlora_pl.adapters.io.adapter_file import AdapterFile
from randlora_pl.adapters.io.save_load import place_adapter, read_adapter
from randlora_pl.adapters.kept import base_buffers, forget_computed, moved_buffers
from randlora_pl.adapters.layers.attach import attach
from randlora_pl.adapters.operations import adapted_layers, detach, merge, report_of, unmerge
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.weighted_sum import WeightedSum
from randlora_pl.utils.errors import UserError, near

Choice = str | Mapping[str, float] | None
"""The name of an adapter, a weight for each of several, or None for the base."""


@dataclass
class _Loaded:
    """An adapter that is in use, or waits.

    Attributes:
        report: What `inject` said of it.
        updates: The update of each layer by path; in the model only while it is active.
        own: The model's own tensors as it has them (full fine-tuning, BitFit, trained heads, statistics), by name.
    """

    report: InjectionReport
    updates: dict[str, DeltaWeight]
    own: dict[str, Tensor] = field(default_factory=dict)


class AdapterSet:
    """Adapters of one base model that take turns in it; the base's weights are there once and stay bit for bit.

    While one adapter is active, the model is what `load_adapter` would have made of it: `merge`, `disabled`,
    `delta_weights`, `save_adapter` and the rest work, and its parameters are those of the active adapter only. The
    others wait outside the model. A weighted sum is active as W0 + sum_i w_i (W_i - W0), with gradients to each of
    its adapters. Adapters may differ in method, rank, seed and targets; equal random bases are held once.
    A model that is merged is merged again after a switch. Not for use by several threads at once.

    Example:
        >>> adapters = AdapterSet(model)
        >>> adapters.load("cars", "runs/cars/adapter")
        >>> adapters.load("pets", "pets.safetensors")
        >>> adapters.use("cars")
        >>> adapters.use({"cars": 0.5, "pets": 0.5})
        >>> with adapters.using(None):  # the base, and back
        ...     model(images)

    Args:
        model: The base model, without an adapter; its parameters are frozen.

    Raises:
        UserError: If the model has adapters already.
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(model, "adapter_report", None) is not None or adapted_layers(model):
            raise UserError("the model has adapters already; start from the base model, and load each into the set.")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = model
        self._loaded: dict[str, _Loaded] = {}
        self._active: dict[str, float] = {}
        self._base: dict[str, Tensor] = {}  # the base's own tensors, while an adapter's are in their place
        self._merged = False  # as the model was when it last had layers to merge

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they were loaded."""
        return list(self._loaded)

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their weights: ``{"cars": 1.0}`` for one, nothing for the base."""
        return dict(self._active)

    @torch.inference_mode(False)
    def load(self, name: str, adapter: str | os.PathLike[str] | AdapterFile) -> AdapterFile:
        """Reads an adapter and keeps it under a name; what is active stays so.

        Args:
            name: What to call it.
            adapter: The adapter folder, one ``.safetensors`` file, or what `read_adapter` made of it.

        Returns:
            What was read, with the head and metadata that it carries.

        Raises:
            UserError: If the name is taken, or the adapter does not fit; every mismatch is named, nothing is changed.
        """
        if name in self._loaded:
            raise UserError(f"there is an adapter {name!r} already; remove({name!r}) first, or give another name.")
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
            update.eval()  # to predict; set_train_mode(model) is for training
        self._share_bases(updates)
        self._loaded[name] = _Loaded(report, updates, own)
        return file

    def remove(self, name: str) -> None:
        """Forgets an adapter; where it is active, the base takes its place.

        Raises:
            UserError: If there is no such adapter.
        """
        self._weights(name)
        if name in self._active:
            self.use(None)
        del self._loaded[name]

    @torch.inference_mode(False)  # tensors that are moved or merged may take part in autograd later
    def use(self, choice: Choice) -> None:
        """Makes an adapter, a weighted sum, or the base the active one.

        Args:
            choice: A name; a weight for each of several; or None for the base.

        Raises:
            UserError: If a name is unknown, a weight is not finite, an adapter cannot be part of a sum, or the model
                was unloaded. What was active stays so.
        """
        self._keep_statistics()
        weights = self._weights(choice)
        self._check_model()
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
        """The model with an adapter, a sum or the base inside a ``with`` block; then back to what was active.

        Raises:
            UserError: As `use`.
        """
        before = self._active
        self.use(choice)
        try:
            yield self.model
        finally:
            self.use(before)

    def _weights(self, choice: Choice) -> dict[str, float]:
        """A choice as weights other than zero, checked."""
        weights = {choice: 1.0} if isinstance(choice, str) else dict(choice or {})
        for name, weight in weights.items():
            if name not in self._loaded:
                names = ", ".join(self._loaded) or "none"
                raise UserError(f"there is no adapter {name!r}; loaded: {names}.{near(name, self._loaded)}")
            if not math.isfinite(weight):
                raise UserError(f"the weight of the adapter {name!r} is {weight}; give a finite number.")
        weights = {name: float(weight) for name, weight in weights.items() if weight}
        for name in weights if list(weights.values()) != [1.0] else ():
            if self._loaded[name].own:
                method = self._loaded[name].report.adapter.method()
                raise UserError(
                    f"{name!r} ({method}) changes the model's own tensors: use it alone with weight 1, or "
                    "write the sum with randlora-pl adapter add (scaled: randlora-pl adapter merge --scale)."
                )
        return weights

    def _check_model(self) -> None:
        """Refuses a model that is not as it was left, because its frozen weights are no longer known."""
        layers = {path: layer.delta for path, layer in adapted_layers(self.model).items() if layer.delta is not None}
        paths = {path for name in self._active for path in self._loaded[name].updates}
        report = self._loaded[next(iter(self._active))].report if list(self._active.values()) == [1.0] else None
        if layers.keys() != paths or getattr(self.model, "adapter_report", None) is not report:
            raise UserError("the model was unloaded or adapted by others since; make a new AdapterSet of a base model.")

    def _leave(self) -> None:
        """Takes the active adapters out; the base is left, bit for bit."""
        layers = [layer for layer in adapted_layers(self.model).values() if layer.delta is not None]
        self._merged = any(layer.merged for layer in layers) if layers else self._merged
        for path, tensor in self._moved().items():
            _tensor(self.model, path).data = tensor
        unmerge(self.model)
        detach(self.model)
        for name in self._active:
            own = self._loaded[name].own
            for path in own:
                tensor = _tensor(self.model, path)
                own[path], tensor.data = tensor.data, self._base[path].to(tensor.device)
                tensor.requires_grad_(False)
        self._base, self._active = {}, {}
        forget_computed(self.model)

    def _moved(self) -> dict[str, Tensor]:
        """The base's own statistics, as copies, where a training in the set has moved them."""
        if not self._active:
            return {}
        before = self._loaded[next(iter(self._active))].report.buffers
        moved = moved_buffers(self.model, before)
        return {path: before[path].to(tensor, copy=True) for path, tensor in moved.items() if path not in self._base}

    def _keep_statistics(self) -> None:
        """Lets the active adapter own the statistics that a training has moved; a sum cannot own any."""
        if list(self._active.values()) == [1.0]:
            moved = self._moved()
            self._loaded[next(iter(self._active))].own.update({path: _tensor(self.model, path).data for path in moved})
            self._base |= moved

    def _enter(self, weights: dict[str, float]) -> None:
        """Puts adapters into the base."""
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
        for path, update in updates.items():
            update.to(next(self.model.get_submodule(path).parameters()).device)
        attach(self.model, updates)
        if alone:
            self.model.adapter_report = self._loaded[next(iter(weights))].report  # type: ignore[assignment]
        if self._merged:
            merge(self.model)

    def _share_bases(self, updates: Mapping[str, DeltaWeight]) -> None:
        """Lets an adapter take equal random bases from those that are there."""
        known = {_key(bases): bases for loaded in self._loaded.values() for bases in _bases_in(loaded.updates).values()}
        for holder, bases in _bases_in(updates).items():
            holder.bases = known.setdefault(_key(bases), bases)


def _tensor(model: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by name."""
    module, _, name = path.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), name)
    return tensor


def _bases_in(updates: Mapping[str, DeltaWeight]) -> dict[nn.Module, Bases]:
    """The random bases of updates, by the module that holds them."""
    held = [(module, getattr(module, "bases", None)) for update in updates.values() for module in update.modules()]
    return {module: bases for module, bases in held if isinstance(bases, Bases)}


def _key(bases: Bases) -> tuple[object, ...]:
    """Equal for bases of equal bits; never for two without a fingerprint (on the meta device)."""
    return bases.fingerprint or id(bases), bases.A.dtype, bases.B.dtype, bases.scale
