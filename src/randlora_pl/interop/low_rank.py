"""Low-rank approximation of any updates as a LoRA adapter."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, adapter_file, derived, inject, operations, random_bases, save_load
from randlora_pl.adapters.methods import lora
from randlora_pl.adapters.select import select
from randlora_pl.adapters.sites import Site, find_sites, weight_key
from randlora_pl.interop import base_model, merge
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors, disk_size, scratch_folder
from randlora_pl.utils.weights_files import without_local_paths

_READ = ("frame", "dataset")
"""What `predict` reads of a training run: the preprocessing of images, and the dataset, which decides on a template."""


@dataclass(frozen=True)
class Layer:
    """Layer of a converted LoRA adapter: shape, rank, relative error and the norm of its update."""

    layer: str
    shape: tuple[int, int]
    rank: int
    error: float
    norm: float


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: layers in the model's order, trainable parameters, and bytes on disk.

    ``difference`` is the largest absolute difference of outputs on random ``inputs`` from the exact sum of updates,
    ``relative`` the same relative to the largest output.
    """

    layers: list[Layer]
    parameters: int
    size: int
    difference: float
    relative: float
    inputs: str

    @property
    def error(self) -> float:
        """Relative error over all layers in the Frobenius norm."""
        whole = sum(layer.norm**2 for layer in self.layers)
        return float((sum((layer.error * layer.norm) ** 2 for layer in self.layers) / whole) ** 0.5) if whole else 0.0


def write_lora(
    path: Path,
    base: base_model.Base,
    total: base_model.State,
    files: Sequence[AdapterFile],
    first: AdapterFile,
    *,
    rank: int | None = None,
    error: float | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Converted:
    """Write updates as a LoRA adapter in this project's format, and verify it before it gets its final name.

    Args:
        path: Output folder, or a file that ends in ``.safetensors``.
        base: Base model.
        total: Updates by key of the base model's state dict, from `updates` or `weighted_sum`.
        files: Source adapters; they define the adapted rows of packed weights.
        first: Adapter whose head, class names and task are kept.
        rank: Rank of every layer, at most the smaller side of each.
        error: Alternative to ``rank``: maximum relative error (Frobenius), met with the smallest rank per layer.
        origin: Provenance for the metadata.

    Raises:
        UserError: LoRA cannot represent an updated tensor, or the outputs of the written adapter differ.
    """
    made = base.copy()
    made = base_model.Base(made.model, made.submodule_for(first))
    sites, targets, qkv = _layers_of(made.part, total, files, first)
    low = {
        site: derived.truncate(_rows(total, made.part, site), rank, error, f"the update of {site.shape.layer}")
        for site in sites
    }
    ranks = {site.shape.layer: factors.rank for site, factors in low.items()}
    inject(made.part, lora.with_ranks(ranks, {}, qkv=qkv, seed=first.adapter.key), targets, first.trained)
    parameters = operations.trainable_parameters(made.part)
    with torch.no_grad():
        for name, tensor in base_model.beside(first, made.part).items():
            parameters[name].copy_(tensor)
        for site, factors in low.items():
            parameters[f"{adapter_file.tensor_prefix(site)}B"].copy_(factors.left)
            parameters[f"{adapter_file.tensor_prefix(site)}A"].copy_(factors.right)
    relative, absolute = base_model.difference(base.outputs(made.model), merge.added(base, first, total).expected)
    config = without_local_paths(first.config)
    metadata = config.get("metadata", {})
    if "arguments" in metadata:
        metadata["arguments"] = {**metadata["arguments"], "targets": targets}
    if "training" in metadata:  # its metrics were measured with another adapter
        metadata["training"] = {key: value for key, value in metadata["training"].items() if key in _READ}
    description: dict[str, Any] = {
        "base_model": {k: v for k, v in config.get("base_model", {}).items() if k != "weights_sha256_sampled"},
        "extra": first.extra,
        "metadata": {**metadata, "made_from": dict(origin or {})},
    }
    with disk_errors(path), scratch_folder(path) as part:
        save_load.save_adapter(made.part, part / path.name, **description)
        again = base_model.adapted(base, save_load.read_adapter(part / path.name))
        actual, expected, plain = map(base.outputs, (again.model, made.model, base.model))
        base_model.check_written(actual, expected, plain, "outputs of the LoRA adapter, read again,")
    with disk_errors(path):
        save_load.save_adapter(made.part, path, **description)  # replaces only an adapter
    layers = []
    for site, factors in low.items():
        shape, norm = (site.shape.out_features, site.shape.in_features), _rows(total, base.model, site).double().norm()
        layers.append(Layer(site.shape.layer, shape, factors.rank, factors.error, float(norm)))
    return Converted(
        layers,
        sum(parameter.numel() for parameter in parameters.values()),
        disk_size(path),
        absolute,
        relative,
        "tokens" if base.generates_text else "images",
    )


def label(file: AdapterFile) -> str:
    """Return an adapter's name and the start of its checksum; the local path is not included."""
    sums = json.dumps(file.config.get("sha256"), sort_keys=True)
    return f"{file.path.absolute().name} (SHA-256 {hashlib.sha256(sums.encode()).hexdigest()[:12]})"


def _layers_of(
    part: nn.Module, total: base_model.State, files: Sequence[AdapterFile], first: AdapterFile
) -> tuple[list[Site], list[str] | None, str]:
    """Return the sites that get a LoRA update, and the ``targets`` and ``qkv`` that select them."""
    updated = {key for key, delta in total.items() if bool((delta != 0).any())}
    names = {name for file in files if not file.adapter.trains_base for name in file.layers}
    sites = find_sites(part)
    named = [site for site in sites if site.shape.layer in names]
    whole = {site.path for site in named if not site.block}
    elsewhere = {site.path for site in sites if not site.block and weight_key(part, site) in updated}
    whole |= elsewhere - {site.path for site in named}
    chosen = [site for site in sites if (site.path in whole) != bool(site.block) and (not site.block or site in named)]
    outside = sorted(updated - {weight_key(part, site) for site in chosen})
    if unknown := set(outside) - part.state_dict().keys():
        raise UserError(
            f"{first.path} belongs to the image tower alone, and {len(unknown)} updated tensors are elsewhere "
            f"({min(unknown)} ...): use the head of an adapter of the whole model (--head), or --as merged."
        )
    if outside:
        raise UserError(
            f"{len(outside)} updated tensors have no place in a LoRA adapter of {first.path} ({', '.join(outside[:3])}"
            f"{' ...' if len(outside) > 3 else ''}): it adds to weights of linear and attention layers only. "
            "Write merged weights instead: adapter merge, or adapter add --as merged."
        )
    if not chosen:
        raise UserError(f"{first.path} changes no weight of its base model, so nothing can be converted.")
    layers = [site.shape.layer for site in chosen]
    same = not first.adapter.trains_base and set(first.layers) == set(layers)
    if same and select(part, first.targets, first.adapter.qkv == "split") == chosen:
        return chosen, first.targets, first.adapter.qkv
    return chosen, [f"^{random_bases.exact_pattern(layers)}"], "packed"


def _rows(total: base_model.State, part: nn.Module, site: Site) -> Tensor:
    """Return a site's update, (out, in), its block of a packed weight, or zeros without an update."""
    update = total.get(weight_key(part, site))
    if update is None:
        return torch.zeros(site.shape.out_features, site.shape.in_features)
    return base_model.rows_of(update, site)
