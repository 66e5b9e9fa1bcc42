"""Numeric summary of an adapter, from its file and, if available, its base model; and uses that its prompts refuse."""

from typing import Any

from torch import Tensor

from randlora_pl.adapters import AdapterFile, derived
from randlora_pl.adapters.methods.full import BaseWeightMethod
from randlora_pl.interop.base_model import State, layer_updates, load_base, site_weights
from randlora_pl.prompts import CoOp, PromptLearner
from randlora_pl.tasks.prompt.features import PromptedClip
from randlora_pl.tasks.prompt.parts import SecondHeadOptions
from randlora_pl.tasks.prompt.task import PARTS
from randlora_pl.tasks.restore import prompts_of, task_class
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_size


def facts(file: AdapterFile) -> dict[str, Any]:
    """Return everything in the file as JSON values."""
    config, metadata = file.config, file.metadata
    arguments = metadata.get("arguments", {})
    prompts = sum(tensor.numel() for name, tensor in file.extra.items() if name.startswith("prompts."))
    return {
        "path": str(file.path),
        **file.adapter.describe(),
        "format_version": config["format_version"],
        "parameters": sum(tensor.numel() for name, tensor in file.tensors.items() if name not in file.kept),
        "kept_numbers": sum(file.tensors[name].numel() for name in file.kept),
        "head_parameters": sum(tensor.numel() for tensor in file.extra.values()) - prompts,
        "prompt_parameters": prompts,
        "tensor_bytes": sum(t.numel() * t.element_size() for t in (*file.tensors.values(), *file.extra.values())),
        "file_bytes": disk_size(file.path),
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
        "several_labels": metadata.get("several_labels", False),
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
            weights = {name: value.detach() for name, value in part.named_parameters()}
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
    measured = derived.spectrum(matrix) if matrix is not None and matrix.dim() == 2 else None
    sizes = {prefix + name: getattr(measured, name, None) for name in ("rank", "stable_rank", "effective_rank", "norm")}
    if matrix is not None and measured is None:  # biases, norms, the patch convolution
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


def parts_of(file: AdapterFile) -> tuple[PromptLearner, SecondHeadOptions | None, bool] | None:
    """Return the prompt learner and the second head that an adapter file has; None without a `PromptTask`.

    The third is True if a second stage has trained the head, which the texts do not give.

    Raises:
        UserError: One of them is unknown, or its options do not fit.
    """
    kind = task_class(file)
    if kind is None or not issubclass(kind, PromptedClip):
        return None
    made = kind.arguments(file.metadata.get("arguments", {}), file.path)
    return made.get("prompts", CoOp()), made.get("head"), bool(made.get("classifier_steps"))


def check_merge(file: AdapterFile, scale: float = 1.0) -> None:
    """Refuse to write weights for a bare library that would be another model.

    Raises:
        UserError: Prompts, second head or scale do not allow it; the message has what does.
    """
    parts = parts_of(file)
    if parts is None:
        return
    prompts, head, classifier = parts
    if prompts.per_image:
        why = f"{prompts.method()} has other class features for each image, so it has no head"
    elif prompts.visual:
        why = "visual prompts are inputs, no weight can hold them"
    else:
        why = "" if head is None else head.why_not_linear
    if why:
        ways = "predict and serve accept the adapter"
        ways += "" if prompts.per_image else ", and adapter export --to onnx writes a program"
        raise UserError(f"{file.path} cannot be merged: {why}. {ways[0].upper()}{ways[1:]}.")
    if scale != 1 and (prompts.learns or classifier):
        what, verb = ("prompts", "were") if prompts.learns else ("classifier", "was")
        raise UserError(f"--scale is {scale:g}: the {what} of {file.path} {verb} learned for the whole update, 1.")


def check_no_prompts(file: AdapterFile, why: str) -> None:
    """Refuse an operation on the weight update alone, which is another model without the prompts.

    Args:
        file: The adapter.
        why: The reason, such as ``PEFT has no place for them``.

    Raises:
        UserError: Prompts or a second head were learned.
    """
    parts = parts_of(file)
    if parts is None:
        return
    prompts, head, classifier = parts
    what = prompts.method() if prompts.learns else "" if head is None else head.method()
    what = what or ("classifier_steps" if classifier else "")
    if what:
        raise UserError(f"{file.path} has learned prompts or another head ({what}): {why}.")
