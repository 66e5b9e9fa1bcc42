"""Adapter folders: `adapter.safetensors` with the trained tensors and `adapter_config.json` beside it.

A folder is written whole under a temporary name and takes the place of an older one by two renames: a
run that is killed leaves the old one or the new one, and in the instant between the renames both under
hidden names beside it. Loading reads and checks everything, names every mismatch at once, and only then
touches the model.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.bases import GENERATOR
from randlora_pl.adapters.control import adapted_layers, report_of, trainable_parameters, unmerge
from randlora_pl.adapters.dora import DoRA
from randlora_pl.adapters.inject import (
    InjectionReport,
    chosen_tensors,
    generator_facts,
    hash_weights,
    inject,
    make_deltas,
)
from randlora_pl.adapters.lora import LoRA
from randlora_pl.adapters.nola import NoLA
from randlora_pl.adapters.randlora import RandLoRA
from randlora_pl.adapters.targets import Site, select
from randlora_pl.adapters.vera import VeRA
from randlora_pl.adapters.whole import BitFit, FullFineTuning, LinearProbe, Whole
from randlora_pl.errors import UserError

FORMAT_VERSION = 1
TENSORS, CONFIG = "adapter.safetensors", "adapter_config.json"
METHODS: dict[str, Callable[..., Adapter]] = {
    method.__name__: method for method in (RandLoRA, LoRA, VeRA, NoLA, DoRA, FullFineTuning, LinearProbe, BitFit)
}
EXTRA = "extra."
"""Prefix of tensors that belong to no layer of the model, such as a classification head."""


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter folder.

    Attributes:
        folder: Where it lies.
        adapter: The method and its options.
        targets: The targets it was injected with.
        tensors: The trained tensors by name.
        extra: Tensors of no layer (a head), by name without the prefix.
        config: Everything in ``adapter_config.json``.
    """

    folder: Path
    adapter: Adapter
    targets: list[str] | None
    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]
    config: dict[str, Any]


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the trained tensors of a model and how they came to be; replaces an older folder at once.

    Args:
        model: A model with an adapter, merged or not.
        folder: Where to write; parents are made.
        base_model: Identity of the base model: library, name, pretrained tag.
        extra: Tensors of no layer of the model, for example a head.
        metadata: Anything JSON that belongs to it: class names, prompts, a summary of the training.

    Returns:
        The folder.

    Raises:
        UserError: If the model has no adapter, or the folder holds anything but an older adapter.
        OSError: If it cannot be written, for example because the disk is full; the older adapter stays.
    """
    report = report_of(model)
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in trainable_parameters(model).items()}
    tensors |= {EXTRA + name: tensor.detach().cpu().contiguous() for name, tensor in (extra or {}).items()}
    config = {
        "format_version": FORMAT_VERSION,
        **report.adapter.describe(),
        **generator_facts(report),
        "targets": report.targets,
        "layers": {row.layer: list(row.shape) for row in report.rows},
        "base_model": {**(base_model or {}), "weights_sha256_sampled": report.base_hash},
        "metadata": dict(metadata or {}),
    }
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or {entry.name for entry in folder.iterdir()} - {TENSORS, CONFIG}):
        raise UserError(f"{folder} holds other things than an adapter; name a new folder, nothing was written.")
    part = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        save_file(tensors, part / TENSORS, metadata={"format": "pt"})
        config["sha256"] = _digest(config, part / TENSORS)
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        for name in (TENSORS, CONFIG):  # a power cut must not find the folder renamed and its files empty
            with (part / name).open("r+b") as stream:
                os.fsync(stream.fileno())
        (part / TENSORS).chmod((part / CONFIG).stat().st_mode)  # safetensors makes files that only their owner may read
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        system = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        if system or (isinstance(error, OSError) and error.filename is None):  # safetensors hides the system's error
            code = int(system[1]) if system else getattr(error, "errno", None) or 0
            raise OSError(code, os.strerror(code), str(folder)) from error
        raise
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old)
    else:
        part.rename(folder)
    return folder


def _digest(config: Mapping[str, Any], tensors: Path) -> str:
    """SHA-256 of both files of a folder, apart from the entry that holds it; safetensors has no checksum of its own."""
    content = json.loads(json.dumps({name: value for name, value in config.items() if name != "sha256"}))
    with tensors.open("rb") as stream:
        inner = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(f"{json.dumps(content, sort_keys=True)} {inner}".encode()).hexdigest()


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter folder without a model.

    Raises:
        UserError: If something is missing, damaged, or of a later format.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise UserError(
            f"{folder} is no adapter folder: it needs {CONFIG} and {TENSORS}. A run keeps it in <run>/adapter."
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
        version, method, options = int(config["format_version"]), config["method"], dict(config["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG} cannot be read ({type(error).__name__}: {error}); save it again.") from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{folder} has format {version}, this version reads up to {FORMAT_VERSION}: update randlora-pl."
        )
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / TENSORS} cannot be read ({error}): truncated or damaged; copy it again.") from None
    if config.get("sha256") not in (None, _digest(config, folder / TENSORS)):
        raise UserError(
            f"{folder} is damaged, or was changed after it was saved: copy it again, or delete "
            f'"sha256" in its {CONFIG} to take it as it is.'
        )
    adapter = make_adapter(method, options, folder)
    extra = {name.removeprefix(EXTRA): tensor for name, tensor in tensors.items() if name.startswith(EXTRA)}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(EXTRA)}
    return AdapterFile(folder, adapter, config.get("targets"), own, extra, config)


def make_adapter(method: str, options: Mapping[str, Any], source: object) -> Adapter:
    """An adapter from its name and JSON options.

    Raises:
        UserError: If the method or one of its options is unknown; ``source`` is named as the place.
    """
    if method not in METHODS:
        raise UserError(f"{source}: method {method!r} is unknown; this version knows {', '.join(METHODS)}.")
    try:
        made = {
            name: make_adapter(value["method"], value["options"], source) if name == "inner" else value
            for name, value in options.items()
        }
        return METHODS[method](**made)
    except (TypeError, KeyError) as error:
        raise UserError(f"{source}: {method} does not take these options ({error}).") from None


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> AdapterFile:
    """Injects a saved adapter into its base model, or reloads it where the same one is in place.

    Args:
        model: The base model, with the weights that the adapter was trained on.
        folder: The adapter folder.

    Returns:
        What was read, with the head and metadata that the folder carries.

    Raises:
        UserError: If the folder or the model does not fit; every mismatch is named, the model is unchanged.
    """
    file = read_adapter(folder)
    present = getattr(model, "adapter_report", None)
    adapted = isinstance(present, InjectionReport)
    problems = _differences(file, model, present) if isinstance(present, InjectionReport) else _problems(file, model)
    if problems:
        raise UserError(f"{file.folder} does not fit this model: " + "; ".join(problems[:6]) + ".")
    if not adapted:
        inject(model, file.adapter, file.targets)
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    unmerge(model)
    parameters = trainable_parameters(model)
    with torch.no_grad():
        for name, tensor in file.tensors.items():
            parameters[name].copy_(tensor)
    for layer in merged:
        layer.merge()
    return file


def _differences(file: AdapterFile, model: nn.Module, present: InjectionReport) -> list[str]:
    """Everything that keeps an adapter from replacing the one that a model has."""
    if file.adapter.identity() != present.adapter.identity():
        raise UserError(
            f"{file.folder} holds {file.adapter.describe()}, the model has {present.adapter.describe()}: "
            "unload(model) first, or start from the base model."
        )
    expected = {name: tuple(value.shape) for name, value in trainable_parameters(model).items()}
    return (
        _base_problem(file, present.base_hash)
        + _bases_problem(file, present.fingerprint)
        + _compare(file.tensors, expected)
    )


def _base_problem(file: AdapterFile, here: str) -> list[str]:
    base = file.config.get("base_model", {})
    name = " ".join(str(base[key]) for key in ("library", "name", "pretrained") if base.get(key))
    there = base.get("weights_sha256_sampled")
    if here and there and here != there:
        return [f"it was trained on other weights ({name or 'base'} {there[:12]}, this model {here[:12]})"]
    return []


def _bases_problem(file: AdapterFile, here: str) -> list[str]:
    there, generator = file.config.get("fingerprint"), file.config.get("generator")
    if generator == GENERATOR and there == here:
        return []
    return [
        f"its random bases are {str(there)[:12]} by {generator}, "
        f"seed {file.adapter.key} gives {here[:12]} by {GENERATOR} here"
    ]


def _problems(file: AdapterFile, model: nn.Module) -> list[str]:
    """Everything that keeps an adapter from fitting a base model."""
    problems = _base_problem(file, hash_weights(model))
    if isinstance(file.adapter, Whole):
        chosen = chosen_tensors(model, file.adapter)
        return problems + _compare(file.tensors, {name: tuple(value.shape) for name, value in chosen.items()})
    try:
        sites = select(model, file.targets, file.adapter.qkv == "split")
    except UserError as error:
        return [*problems, str(error)]
    shapes = {s.shape.layer: [s.shape.out_features, s.shape.in_features] for s in sites}
    saved = file.config.get("layers", {})
    layers = [name for name in sorted(shapes.keys() | saved.keys()) if shapes.get(name) != saved.get(name)]
    if layers:
        problems += [f"layer {name} is {saved.get(name)} there and {shapes.get(name)} here" for name in layers]
        return problems
    deltas, fingerprint = make_deltas(file.adapter, sites, model)
    problems += _bases_problem(file, fingerprint)
    expected: dict[str, tuple[int, ...]] = {}
    for site, delta in deltas.items():
        expected |= {f"{_prefix(site)}{n}": tuple(p.shape) for n, p in delta.named_parameters()}
    return problems + _compare(file.tensors, expected)


def _prefix(site: Site) -> str:
    """What precedes an update's own tensor names in the adapted model's state dict."""
    return f"{site.path}.delta.{site.block}.".lstrip(".") if site.block else f"{site.path}.delta.".lstrip(".")


def _compare(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    problems = []
    for label, names in (
        ("missing", sorted(expected.keys() - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - expected.keys())),
    ):
        if names:
            problems.append(f"{len(names)} {label} tensors ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''})")
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} there and {shape} here"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    return problems
