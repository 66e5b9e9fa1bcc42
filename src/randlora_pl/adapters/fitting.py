"""Whether a saved adapter fits a model: every mismatch by name, before anything is touched."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from randlora_pl.adapters.bases import GENERATOR
from randlora_pl.adapters.control import too_small, trainable_parameters, with_bases
from randlora_pl.adapters.inject import InjectionReport, chosen_tensors, hash_weights, make_deltas
from randlora_pl.adapters.targets import Site, select
from randlora_pl.adapters.whole import Whole
from randlora_pl.errors import UserError

if TYPE_CHECKING:
    from randlora_pl.adapters.files import AdapterFile


def differences(file: "AdapterFile", model: nn.Module, present: InjectionReport) -> list[str]:
    """Everything that keeps an adapter from replacing the one that a model has."""
    if file.adapter.identity() != present.adapter.identity():
        raise UserError(
            f"{file.path} holds {file.adapter.describe()}, the model has {present.adapter.describe()}: "
            "unload(model) first, or start from the base model."
        )
    expected = {name: tuple(value.shape) for name, value in trainable_parameters(model).items()}
    return (
        _base_problem(file, present.base_hash)
        + _bases_problem(file, present.fingerprint, model.modules())
        + _compare(file.tensors, expected)
    )


def problems(file: "AdapterFile", model: nn.Module) -> list[str]:
    """Everything that keeps an adapter from fitting a base model."""
    found = _base_problem(file, hash_weights(model))
    if isinstance(file.adapter, Whole):
        chosen = chosen_tensors(model, file.adapter)
        return found + _compare(file.tensors, {name: tuple(value.shape) for name, value in chosen.items()})
    try:
        sites = select(model, file.targets, file.adapter.qkv == "split")
    except UserError as error:
        return [*found, str(error)]
    shapes = {s.shape.layer: [s.shape.out_features, s.shape.in_features] for s in sites}
    saved = file.config.get("layers", {})
    layers = [name for name in sorted(shapes.keys() | saved.keys()) if shapes.get(name) != saved.get(name)]
    if layers:
        return found + [f"layer {name} is {saved.get(name)} there and {shapes.get(name)} here" for name in layers]
    deltas, fingerprint = make_deltas(file.adapter, sites, model)
    found += _bases_problem(file, fingerprint, (module for delta in deltas.values() for module in delta.modules()))
    expected: dict[str, tuple[int, ...]] = {}
    for site, delta in deltas.items():
        expected |= {f"{tensor_prefix(site)}{n}": tuple(p.shape) for n, p in delta.named_parameters()}
    return found + _compare(file.tensors, expected)


def _base_problem(file: "AdapterFile", here: str) -> list[str]:
    base = file.config.get("base_model", {})
    name = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    there = base.get("weights_sha256_sampled")
    if here and there and here != there:
        return [f"it was trained on other weights ({name or 'base'} {there[:12]}, this model {here[:12]})"]
    return []


def _bases_problem(file: "AdapterFile", here: str, modules: Iterable[nn.Module]) -> list[str]:
    if file.bases is not None:  # they come along, whatever the seed gives
        problem = too_small(file.bases, with_bases(modules))
        return [problem] if problem else []
    there, generator = file.config.get("fingerprint"), file.config.get("generator")
    if generator == GENERATOR and there == here:
        return []
    return [
        f"its random bases are {str(there)[:12]} by {generator}, "
        f"seed {file.adapter.key} gives {here[:12]} by {GENERATOR} here"
    ]


def tensor_prefix(site: Site) -> str:
    """What precedes an update's own tensor names in the adapted model's state dict."""
    return f"{site.path}.delta.{site.block}.".lstrip(".") if site.block else f"{site.path}.delta.".lstrip(".")


def _compare(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    found = []
    for label, names in (
        ("missing", sorted(expected.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - expected.keys())),
    ):
        if names:
            found.append(f"{len(names)} {label} tensors ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})")
    return found + [
        f"{name} has shape {tuple(tensors[name].shape)} there and {shape} here"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
