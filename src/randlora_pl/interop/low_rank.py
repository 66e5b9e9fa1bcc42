"""Updates of any kind as a LoRA adapter: the best approximation of each by one of low rank."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, LoRA, inject, read_adapter, save_adapter, trainable_parameters
from randlora_pl.adapters.io.compatibility import tensor_prefix
from randlora_pl.adapters.methods.whole.full import BaseWeightMethod
from randlora_pl.adapters.spectrum import LowRank, truncated
from randlora_pl.adapters.targets.select import select
from randlora_pl.adapters.targets.sites import Site, find_sites
from randlora_pl.interop.base_model import Base, beside
from randlora_pl.interop.compare_outputs import LOST, difference, lost, outputs
from randlora_pl.interop.library_model import Bare
from randlora_pl.interop.merge.vision import TOLERANCE, added
from randlora_pl.interop.updates import State, adapted, rows_of, weight_key
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import part_folder
from randlora_pl.utils.files.weights_files import without_local_paths


@dataclass(frozen=True)
class Layer:
    """One layer of a LoRA adapter that was made of an update: its shape, rank, relative error and the update's norm."""

    layer: str
    shape: tuple[int, int]
    rank: int
    error: float
    norm: float


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        layers: Each layer, in the model's order.
        parameters: Trained parameters of the adapter.
        size: Bytes on the disk.
        difference: Largest absolute difference of outputs on random images, the exact sum of updates against this.
        relative: The same relative to the largest output.
    """

    layers: list[Layer]
    parameters: int
    size: int
    difference: float
    relative: float

    @property
    def error(self) -> float:
        """Relative error of all layers together, in the Frobenius norm."""
        whole = sum(layer.norm**2 for layer in self.layers)
        return float((sum((layer.error * layer.norm) ** 2 for layer in self.layers) / whole) ** 0.5) if whole else 0.0


def write_lora(
    path: Path,
    base: Base,
    total: State,
    files: Sequence[AdapterFile],
    first: AdapterFile,
    *,
    rank: int | None = None,
    error: float | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Converted:
    """Writes updates as a LoRA adapter in our own format, and compares it before it gets its name.

    Args:
        path: A folder, or a file whose name ends in ``.safetensors``.
        base: The base model.
        total: The updates by key of the base model's state dict, as `updates` and `weighted_sum` give them.
        files: The adapters that they come from; they say which rows of a packed weight are adapted.
        first: The one whose head, class names and task go with it.
        rank: Rank of every layer, at most the smaller side of each.
        error: Instead: the smallest rank of each layer whose relative error (Frobenius) is at most this.
        origin: Kept in the metadata: what it was made from.

    Raises:
        UserError: An update changes a tensor that LoRA has no place for, or the outputs differ from what was meant.
    """
    made = base.copy()
    made = Base(made.model, made.part_of(first))
    sites, targets, qkv = _layers_of(made.part, total, files, first)
    low = {
        site: truncated(_rows(total, made.part, site), rank, error, f"the update of {site.shape.layer}")
        for site in sites
    }
    inject(made.part, _adapter(low, qkv, first.adapter.key), targets, first.trained)
    parameters = trainable_parameters(made.part)
    with torch.no_grad():
        for name, tensor in beside(first, made.part).items():
            parameters[name].copy_(tensor)
        for site, factors in low.items():
            parameters[f"{tensor_prefix(site)}B"].copy_(factors.left)
            parameters[f"{tensor_prefix(site)}A"].copy_(factors.right)
    size = Bare.of(first.config["base_model"]).image.size
    relative, absolute = difference(outputs(made.model, size), added(base, first, total, with_head=False).expected)
    _save_checked(path, made, base, size, _description(first, targets, origin or {}))
    return Converted(
        [_layer(site, factors, _rows(total, base.model, site)) for site, factors in low.items()],
        sum(parameter.numel() for parameter in parameters.values()),
        sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())),
        absolute,
        relative,
    )


def label(file: AdapterFile) -> str:
    """An adapter's name and the beginning of its checksum: where it lies on this machine is nobody's business."""
    sums = json.dumps(file.config.get("sha256"), sort_keys=True)
    return f"{file.path.absolute().name} (SHA-256 {hashlib.sha256(sums.encode()).hexdigest()[:12]})"


def _layer(site: Site, factors: LowRank, update: Tensor) -> Layer:
    shape = (site.shape.out_features, site.shape.in_features)
    return Layer(site.shape.layer, shape, factors.rank, factors.error, float(update.double().norm()))


def _layers_of(
    part: nn.Module, total: State, files: Sequence[AdapterFile], first: AdapterFile
) -> tuple[list[Site], list[str] | None, str]:
    """Which weights get a LoRA update, and the targets and ``qkv`` that name them.

    Raises:
        UserError: An update changes a tensor that is no weight of a linear or attention layer of this part.
    """
    updated = {key for key, delta in total.items() if bool((delta != 0).any())}
    names = {name for file in files if not isinstance(file.adapter, BaseWeightMethod) for name in file.layers}
    sites = find_sites(part)
    named = [site for site in sites if site.shape.layer in names]
    whole = {site.path for site in named if not site.block}
    whole |= {s.path for s in sites if not s.block and weight_key(part, s) in updated} - {site.path for site in named}
    chosen = [site for site in sites if (site.path in whole) != bool(site.block) and (not site.block or site in named)]
    outside = sorted(updated - {weight_key(part, site) for site in chosen})
    if elsewhere := set(outside) - part.state_dict().keys():
        raise UserError(
            f"{first.path} belongs to the image tower alone, and {len(elsewhere)} updated tensors are elsewhere "
            f"({min(elsewhere)} ...): take the head of an adapter of the whole model (--head), or --as merged."
        )
    if outside:
        raise UserError(
            f"{len(outside)} updated tensors have no place in a LoRA adapter of {first.path} ({', '.join(outside[:3])}"
            f"{' ...' if len(outside) > 3 else ''}): it adds to weights of linear and attention layers only. "
            "Write merged weights instead: adapter merge, or adapter add --as merged."
        )
    if not chosen:
        raise UserError(
            f"{first.path} changes no weight of its base model, so there is nothing to make a LoRA adapter of."
        )
    same = not isinstance(first.adapter, BaseWeightMethod) and set(first.layers) == {
        site.shape.layer for site in chosen
    }
    if same and select(part, first.targets, first.adapter.qkv == "split") == chosen:
        return chosen, first.targets, first.adapter.qkv
    return chosen, [_only(site.shape.layer) for site in chosen], "packed"


def _only(layer: str) -> str:
    """A pattern that fits one layer's whole name and no name that ends so."""
    return f"^{re.escape(layer)}"


def _rows(total: State, part: nn.Module, site: Site) -> Tensor:
    """A site's update, (out, in): all of its weight's, or its block of rows; zeros where none of the updates has it."""
    update = total.get(weight_key(part, site))
    if update is None:
        return torch.zeros(site.shape.out_features, site.shape.in_features)
    return rows_of(update, site)


def _adapter(low: Mapping[Site, LowRank], qkv: Any, seed: int) -> LoRA:
    """LoRA with a scaling of 1 in every layer: alpha is the rank."""
    ranks = {_only(site.shape.layer): factors.rank for site, factors in low.items()}
    if len(set(ranks.values())) == 1:
        rank = next(iter(ranks.values()))
        return LoRA(rank, float(rank), qkv=qkv, seed=seed)
    return LoRA(ranks, {pattern: float(rank) for pattern, rank in ranks.items()}, qkv=qkv, seed=seed)


def _description(first: AdapterFile, targets: list[str] | None, origin: Mapping[str, Any]) -> dict[str, Any]:
    """What `save_adapter` takes besides the model: base model, head, and metadata with the new targets."""
    config = without_local_paths(first.config)
    metadata = config.get("metadata", {})
    if "arguments" in metadata:
        metadata["arguments"] = {**metadata["arguments"], "targets": targets}
    if "training" in metadata:  # its figures were measured with another adapter
        metadata["training"] = {key: value for key, value in metadata["training"].items() if key == "frame"}
    named = {k: v for k, v in config.get("base_model", {}).items() if k != "weights_sha256_sampled"}
    return {"base_model": named, "extra": first.extra, "metadata": {**metadata, "made_from": dict(origin)}}


def _save_checked(path: Path, made: Base, base: Base, size: int, description: dict[str, Any]) -> None:
    """Writes under another name, loads that into the base model, compares, and writes under the final name."""
    with part_folder(path) as part:
        save_adapter(made.part, part / path.name, **description)
        again = adapted(base, read_adapter(part / path.name))
        found, expected = outputs(again.model, size), outputs(made.model, size)
        relative, _ = difference(found, expected)
        share = lost(found, expected, outputs(base.model, size))
        if relative > TOLERANCE or share > LOST:
            raise UserError(
                f"the LoRA adapter, read again, differs by {relative:.1e} of the largest output, {share:.0%} of what "
                f"it changes, more than {TOLERANCE:.0e} or {LOST:.0%}: nothing was written. "
                "Please report this with the adapter's configuration."
            )
    try:
        save_adapter(made.part, path, **description)  # which replaces nothing but an adapter
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); nothing is left of it.") from error
