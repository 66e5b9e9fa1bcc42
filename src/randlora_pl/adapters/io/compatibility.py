"""Compatibility of adapter files with a model: list every mismatch before the model is changed."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from randlora_pl.adapters.derived import Sketches, derived_buffers, sketch_problems, sketches
from randlora_pl.adapters.injection import InjectionReport, make_deltas
from randlora_pl.adapters.io.base_hash import hash_weights
from randlora_pl.adapters.io.state import adapter_state
from randlora_pl.adapters.kept import base_buffers, kept_problems, update_buffers
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.operations import basis_size_error, with_bases
from randlora_pl.adapters.random_bases import GENERATOR
from randlora_pl.adapters.targets.sites import Site
from randlora_pl.adapters.trained import choose_beside, chosen_tensors, trained_tensors
from randlora_pl.utils.errors import UserError

if TYPE_CHECKING:
    from randlora_pl.adapters.io.adapter_file import AdapterFile

Shapes = dict[str, tuple[int, ...]]


def differences(file: "AdapterFile", model: nn.Module, present: InjectionReport) -> list[str]:
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
        + _bases_problem(file, present.fingerprint, model.modules())
        + sketch_problems(file.derived, sketches(model, file.tensors))
        + kept_problems(model, file.tensors)
        + _compare(file, expected, _shapes(base_buffers(model)))
    )


def problems(file: "AdapterFile", model: nn.Module) -> list[str]:
    """Return all reasons that an adapter does not fit a base model."""
    try:
        beside = trained_tensors(model, file.trained)
    except UserError as error:
        return [str(error)]
    found, statistics = _base_problem(file, hash_weights(model, beside)), _shapes(base_buffers(model))
    if isinstance(file.adapter, BaseWeightMethod):
        chosen = chosen_tensors(model, file.adapter)
        return found + _compare(file, _shapes({**chosen, **beside}), statistics)
    try:
        sites = choose_beside(model, file.targets, file.adapter, beside).sites
    except UserError as error:
        return [*found, str(error)]
    shapes = {s.shape.layer: [s.shape.out_features, s.shape.in_features] for s in sites}
    saved = file.config.get("layers", {})
    layers = [name for name in sorted(shapes.keys() | saved.keys()) if shapes.get(name) != saved.get(name)]
    if layers:
        return found + [f"layer {name} is {saved.get(name)} in the file and {shapes.get(name)} here" for name in layers]
    deltas, fingerprint = make_deltas(file.adapter, sites, model)
    found += _bases_problem(file, fingerprint, (module for delta in deltas.values() for module in delta.modules()))
    expected, here = _shapes(beside), Sketches()
    for site, delta in deltas.items():
        own = {**dict(delta.named_parameters()), **update_buffers(delta)}
        expected |= _shapes({f"{tensor_prefix(site)}{name}": value for name, value in own.items()})
        here |= {f"{tensor_prefix(site)}{name}": value for name, value in sketches(delta, own).items()}
        found += kept_problems(delta, file.tensors, tensor_prefix(site))
    found += [] if found else sketch_problems(file.derived, here)  # other weights have other tensors
    return found + _compare(file, expected, statistics)


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _base_problem(file: "AdapterFile", here: str) -> list[str]:
    base = file.config.get("base_model", {})
    name = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    there = base.get("weights_sha256_sampled")
    if here and there and here != there:
        return [f"it was trained on other weights ({name or 'base'} {there[:12]}, this model {here[:12]})"]
    return []


def _bases_problem(file: "AdapterFile", here: str, modules: Iterable[nn.Module]) -> list[str]:
    if file.bases is not None:  # stored bases replace the seed's
        problem = basis_size_error(file.bases, with_bases(modules))
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
    return f"{site.path}.delta.{site.block}.".lstrip(".") if site.block else f"{site.path}.delta.".lstrip(".")


def _compare(file: "AdapterFile", needed: Shapes, statistics: Shapes) -> list[str]:
    """Return mismatches of a file's tensors with the needed tensors, and with statistics that it may contain."""
    tensors, found = file.tensors, []
    known = needed | {name: shape for name, shape in statistics.items() if name in file.kept}
    for label, names in (
        ("missing", sorted(needed.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - known.keys())),
    ):
        if names:
            found.append(f"{len(names)} {label} tensors ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})")
    return found + [
        f"{name} has shape {tuple(tensors[name].shape)} in the file and {shape} here"
        for name, shape in sorted(known.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
