"""Numeric summary of an adapter, from its file and, if available, its base model."""

from typing import Any

from torch import Tensor

from randlora_pl.adapters import AdapterFile
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.adapters.spectrum import spectrum
from randlora_pl.adapters.trained import chosen_tensors
from randlora_pl.interop.base_model import load_base
from randlora_pl.interop.updates import State, layer_updates, site_weights
from randlora_pl.tasks.prompt.task import PARTS
from randlora_pl.tasks.restore import prompts_of
from randlora_pl.utils.errors import UserError


def facts(file: AdapterFile) -> dict[str, Any]:
    """Return everything in the file as JSON values."""
    config, metadata = file.config, file.metadata
    arguments = metadata.get("arguments", {})
    prompts = sum(tensor.numel() for name, tensor in file.extra.items() if name.startswith("prompts."))
    files = [file.path] if file.path.is_file() else sorted(file.path.iterdir())
    return {
        "path": str(file.path),
        **file.adapter.describe(),
        "format_version": config["format_version"],
        "parameters": sum(tensor.numel() for name, tensor in file.tensors.items() if name not in file.kept),
        "kept_numbers": sum(file.tensors[name].numel() for name in file.kept),
        "head_parameters": sum(tensor.numel() for tensor in file.extra.values()) - prompts,
        "prompt_parameters": prompts,
        "tensor_bytes": sum(t.numel() * t.element_size() for t in (*file.tensors.values(), *file.extra.values())),
        "file_bytes": sum(each.stat().st_size for each in files),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in (*file.tensors.values(), *file.extra.values())}),
        "base_model": config.get("base_model", {}),
        "generator": config.get("generator"),
        "seed": config.get("seed"),
        "fingerprint": config.get("fingerprint"),
        "targets": file.targets,
        "adapted": len(file.layers),
        "trained": file.trained,
        "task": metadata.get("task"),
        "classnames": metadata.get("classnames", []),
        "captions": metadata.get("captions", False),
        "prompts": prompts_of(file).summary(),
        "learned": {name: part for name in PARTS if (part := arguments.get(name)) is not None},
        "training": metadata.get("training", {}),
        "made_from": metadata.get("made_from", {}),
    }


def layers(file: AdapterFile) -> tuple[list[dict[str, Any]], list[str]]:
    """Return spectrum and norm of each update and of its base weight, and reasons for missing values.

    Each layer has ``layer``, ``shape``, ``rank``, ``stable_rank``, ``effective_rank``, ``norm``, ``base_norm``,
    ``base_stable_rank``, ``base_effective_rank`` and ``ratio`` (norm / base_norm); None if unknown. Ranks exist for
    matrices only.
    """
    missing: list[str] = []
    updates: State | None = None
    weights: State = {}
    try:
        updates = layer_updates(file)
    except UserError as error:
        missing.append(f"updates: {error}")
    try:
        part = load_base(file).part
        if isinstance(file.adapter, BaseWeightMethod):
            weights = {name: value.detach() for name, value in chosen_tensors(part, file.adapter).items()}
        else:
            weights = site_weights(part, file.layers)
    except UserError as error:
        if updates is not None:
            missing.append(f"weights of the base model: {error}")
    rows = []
    for name, shape in file.layers.items():
        own, base = (updates or {}).get(name), weights.get(name)
        if own is not None and not own.isfinite().all():
            missing.append(f"the update of {name}: it is not finite (NaN or infinity); the training diverged")
            own = None
        row = {"layer": name, "shape": list(shape), **_sizes(own, ""), **_sizes(base, "base_")}
        known = row["norm"] is not None and row["base_norm"]
        rows.append(row | {"ratio": row["norm"] / row["base_norm"] if known else None})
    return rows, missing


def _sizes(matrix: Tensor | None, prefix: str) -> dict[str, Any]:
    found = spectrum(matrix) if matrix is not None and matrix.dim() == 2 else None
    sizes = {prefix + name: getattr(found, name, None) for name in ("rank", "stable_rank", "effective_rank", "norm")}
    if matrix is not None and found is None:  # biases, norms, the patch convolution
        sizes[prefix + "norm"] = float(matrix.double().norm())
    return sizes


def compared(one: State, two: State) -> list[dict[str, Any]]:
    """Return, per common layer, the norms of both updates, of their difference, and their cosine.

    The cosine is <D1, D2> / (||D1|| ||D2||) of the matrices as vectors; None if one is zero.
    """
    rows = []
    for name in one:
        if name not in two or one[name].shape != two[name].shape:
            continue
        a, b = one[name].double(), two[name].double()
        norms = float(a.norm()), float(b.norm())
        cosine = float((a * b).sum()) / (norms[0] * norms[1]) if all(norms) else None
        rows.append(
            {"layer": name, "shape": list(a.shape), "norm_1": norms[0], "norm_2": norms[1],
             "difference": float((a - b).norm()), "cosine": cosine}
        )  # fmt: skip
    return rows
