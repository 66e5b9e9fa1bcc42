"""Content of an adapter file: the trained state of a model, and every mismatch with a model that is to get it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.derived import Sketches, derived_buffers, sketch_problems, sketches
from randlora_pl.adapters.injection import InjectionReport, make_deltas
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.operations import basis_size_error, report_of, with_bases
from randlora_pl.adapters.random_bases import GENERATOR, Bases
from randlora_pl.adapters.select import choose_beside
from randlora_pl.adapters.sites import Site
from randlora_pl.adapters.trained import (
    base_buffers,
    chosen_tensors,
    hash_weights,
    kept_buffers,
    kept_problems,
    trained_tensors,
    update_buffers,
    update_modules,
    update_tensors,
)
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.weights_files import base_words


@dataclass(frozen=True)
class _State:
    """Trained state of a model, with tensors by name."""

    updates: dict[str, nn.Parameter]
    own: dict[str, nn.Parameter]  # trainable parameters of the model itself
    kept: dict[str, Tensor]
    trained: list[str] | None  # patterns of the fully trained tensors alongside the adapter, for `inject`
    base_hash: str  # of the base model without these tensors; "" if it is unknown

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {**self.updates, **self.own, **self.kept}


def adapter_state(model: nn.Module) -> _State:
    """Return the trained state of a model, also if its parameters are frozen at the moment.

    Parameters whose ``requires_grad`` was set after `inject` are included as if they were in ``trained``.

    Raises:
        UserError: The model has no adapter.
    """
    report = report_of(model)
    inner = {id(own) for module in update_modules(model) for own in module.parameters(recurse=False)}
    updates = {name: each for name, each in model.named_parameters() if id(each) in inner}
    named = {row.layer for row in [*report.rows, *report.beside] if row.kind in ("tensor", "trained")}
    others = {name: each for name, each in model.named_parameters() if name not in updates}
    own = {name: each for name, each in others.items() if name in named or each.requires_grad}
    trained, base_hash = report.trained, report.base_hash
    if by_hand := own.keys() - named:
        trained = [*(trained or []), *(f"^{re.escape(name)}" for name in own if name in by_hand)]
        base_hash = hash_weights(model, own.keys()) if base_hash and not report.adapter.trains_base else ""
    return _State(updates, own, kept_buffers(model), trained, base_hash)


EXTRA = "extra."
"""Prefix of tensors that do not belong to a layer of the model, such as a classification head."""


@dataclass(frozen=True)
class AdapterFile:
    """Validated content of an adapter folder or file.

    Examples:
        >>> file = read_adapter("runs/cars/adapter")
        >>> file.adapter.method(), file.layers["blocks.0.attn.qkv"]
        ('RandLoRA', (192, 64))

    Attributes:
        path: Path of the folder or file.
        adapter: Method and its options.
        targets: Targets of the injection.
        tensors: Trained tensors and kept buffers by name.
        extra: Tensors outside the model's layers (a head), by name without the prefix.
        config: Content of ``adapter_config.json``.
        bases: Random bases that no seed generates, for example after an import; usually None.
    """

    path: Path
    adapter: Adapter
    targets: list[str] | None
    tensors: dict[str, Tensor] = field(repr=False)
    extra: dict[str, Tensor] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    bases: Bases | None = field(default=None, repr=False)

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata: task, class names, prompts, summary of the training."""
        return dict(self.config.get("metadata", {}))

    @property
    def trained(self) -> list[str] | None:
        """Patterns of fully trained tensors, for `inject`."""
        return self.config.get("trained")

    @property
    def kept(self) -> list[str]:
        """Names of the kept buffers among the tensors, which have no gradient."""
        return list(self.config.get("kept", []))

    @property
    def derived(self) -> Sketches:
        """Sketches of the tensors that are derived from the base model's weights."""
        return dict(self.config.get("derived", {}))

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """Shapes (out, in) of the adapted weights, by layer name."""
        return {name: tuple(shape) for name, shape in self.config.get("layers", {}).items()}

    def update_of(self, layer: str) -> tuple[str, str | None, dict[str, Tensor]]:
        """Return path of the module with an adapted weight, block of a packed weight, and the update's own tensors."""
        above, _, last = layer.rpartition(".")
        for path, block in ((layer, None), (above, None if last == "in_proj" else last)):
            start = _update_prefix(path, block)
            own = {name.removeprefix(start): tensor for name, tensor in self.tensors.items() if name.startswith(start)}
            if own:
                break
        return path, block, own


Shapes = dict[str, tuple[int, ...]]


def differences(file: AdapterFile, model: nn.Module, present: InjectionReport) -> list[str]:
    """Return all reasons that an adapter cannot replace the present adapter of a model."""
    if file.adapter.identity() != present.adapter.identity():
        raise UserError(
            f"{file.path} contains {file.adapter.describe()}, the model has {present.adapter.describe()}. "
            "Call merge_and_unload(model) first, or start from the base model."
        )
    state = adapter_state(model)
    derived = derived_buffers(model)  # either of the two may store them
    expected = _shapes({**state.updates, **state.own, **update_buffers(model), **derived})
    expected = {name: shape for name, shape in expected.items() if name not in derived or name in file.tensors}
    return (
        _base_problem(file, state.base_hash)
        + bases_problem(file, present.fingerprint, model.modules())
        + sketch_problems(file.derived, sketches(model, file.tensors))
        + kept_problems(model, file.tensors)
        + _compare(file, expected, _shapes(base_buffers(model)))
    )


def problems(file: AdapterFile, model: nn.Module) -> list[str]:
    """Return all reasons that an adapter does not fit a base model."""
    try:
        beside = trained_tensors(model, file.trained)
    except UserError as error:
        return [str(error)]
    mismatches, statistics = _base_problem(file, hash_weights(model, beside)), _shapes(base_buffers(model))
    try:
        if isinstance(file.adapter, BaseWeightMethod):
            chosen = chosen_tensors(model, file.adapter, file.targets, beside)
            return mismatches + _compare(file, _shapes({**chosen, **beside}), statistics)
        sites = choose_beside(model, file.targets, file.adapter, beside).sites
    except UserError as error:
        return [*mismatches, str(error)]
    shapes = {s.shape.layer: [s.shape.out_features, s.shape.in_features] for s in sites}
    saved = file.config.get("layers", {})
    layers = [name for name in sorted(shapes.keys() | saved.keys()) if shapes.get(name) != saved.get(name)]
    if layers:
        return mismatches + [
            f"layer {name} is {saved.get(name)} in the file and {shapes.get(name)} here" for name in layers
        ]
    deltas, fingerprint = make_deltas(file.adapter, sites, model)
    mismatches += bases_problem(file, fingerprint, (module for delta in deltas.values() for module in delta.modules()))
    expected, here = _shapes(beside), Sketches()
    for site, delta in deltas.items():
        own = update_tensors(delta)
        expected |= _shapes({f"{tensor_prefix(site)}{name}": value for name, value in own.items()})
        here |= {f"{tensor_prefix(site)}{name}": value for name, value in sketches(delta, own).items()}
        mismatches += kept_problems(delta, file.tensors, tensor_prefix(site))
    mismatches += [] if mismatches else sketch_problems(file.derived, here)  # other weights have other tensors
    return mismatches + _compare(file, expected, statistics)


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _base_problem(file: AdapterFile, here: str) -> list[str]:
    base = file.config.get("base_model", {})
    there = base.get("weights_sha256_sampled")
    if here and there and here != there:
        return [f"it was trained on different weights ({base_words(base) or 'base'} {there[:12]}, model: {here[:12]})"]
    return []


def bases_problem(file: AdapterFile, here: str, modules: Iterable[nn.Module]) -> list[str]:
    """Return the reason that updates with random bases of this fingerprint are others than a file's; empty if none."""
    if file.bases is not None:  # stored bases replace the seed's
        problem = basis_size_error(file.bases, with_bases(modules).values())
        return [problem] if problem else []
    there, generator = file.config.get("fingerprint"), file.config.get("generator")
    if generator == GENERATOR and there == here:
        return []
    return [
        f"its random bases are {str(there)[:12]} by {generator}, "
        f"seed {file.adapter.key} gives {here[:12]} by {GENERATOR} here"
    ]


def tensor_prefix(site: Site) -> str:
    """Return the prefix of an update's tensor names in the adapted model's state dict."""
    return _update_prefix(site.path, site.block)


def _update_prefix(path: str, block: str | None) -> str:
    return (f"{path}.delta.{block}." if block else f"{path}.delta.").lstrip(".")


def _compare(file: AdapterFile, needed: Shapes, statistics: Shapes) -> list[str]:
    """Return mismatches of a file's tensors with the needed tensors, and with statistics that it may contain."""
    tensors, mismatches = file.tensors, []
    known = needed | {name: shape for name, shape in statistics.items() if name in file.kept}
    for label, names in (
        ("missing", sorted(needed.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - known.keys())),
    ):
        if names:
            mismatches.append(
                f"{len(names)} {label} tensors ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})"
            )
    return mismatches + [
        f"{name} has shape {tuple(tensors[name].shape)} in the file and {shape} here"
        for name, shape in sorted(known.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
