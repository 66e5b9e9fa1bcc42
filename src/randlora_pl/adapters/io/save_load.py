"""Adapter files: saving what a model has trained, reading it again, and putting it into its base model.

The trained tensors and the kept buffers are stored, the random bases are not: the seed gives them again, and their
fingerprint says that it did. Loading reads and checks everything, names every mismatch at once, and only then touches
the model.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.inject import InjectionReport, generator_facts, inject
from randlora_pl.adapters.io import container
from randlora_pl.adapters.io.adapter_file import EXTRA, AdapterFile
from randlora_pl.adapters.io.compatibility import differences, problems, targets_in
from randlora_pl.adapters.io.container import BASES, CONFIG, Contents
from randlora_pl.adapters.io.state import adapter_state
from randlora_pl.adapters.kept import forget_computed, reset_buffers
from randlora_pl.adapters.methods.fixed_rank.dora import DoRA
from randlora_pl.adapters.methods.fixed_rank.lora import LoRA
from randlora_pl.adapters.methods.fixed_rank.nola import NoLA
from randlora_pl.adapters.methods.fixed_rank.vera import VeRA
from randlora_pl.adapters.methods.full_rank.randlora import RandLoRA
from randlora_pl.adapters.methods.whole.full import BaseWeightMethod, BitFit, FullFineTuning, LinearProbe
from randlora_pl.adapters.operations import adapted_layers, report_of, unmerge, use_bases
from randlora_pl.adapters.random_bases import STORED, Bases
from randlora_pl.utils.adapter_schema import OTHER_VERSION, check_adapter_schema, check_arguments
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files.weights_files import without_local_paths

FORMAT_VERSION, OLDEST_FORMAT = 3, 2
"""2: checksums by tensor, one file, stored bases, a dtype; 3: kept buffers, and tensors of the model that train beside
the adapter."""

METHODS: dict[str, Callable[..., Adapter]] = {
    method.__name__: method for method in (RandLoRA, LoRA, VeRA, NoLA, DoRA, FullFineTuning, LinearProbe, BitFit)
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 2**34
"""Numbers of a weight; the largest of published models have some billions."""


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base_model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes what a model has trained and how it came to be; overwrites an older adapter at the path without asking.

    Tensors that a user has set to train after `inject` are written as if they had been in its ``trained``.

    Args:
        model: A model with an adapter, merged or not.
        path: A folder to write, or one file whose name ends in ``.safetensors``; parents are made. An older adapter
            there is replaced whole once the new one is written.
        base_model: Identity of the base model: library, name, pretrained tag.
        extra: Tensors of no layer of the model, for example a head.
        metadata: Anything JSON that belongs to it: class names, prompts, a summary of the training.
        dtype: What the tensors are stored in; by default as they are, float32.

    Returns:
        The path, absolute.

    Raises:
        UserError: If the model has no adapter, or the path holds anything but an older adapter.
        OSError: If it cannot be written, for example because the disk is full; the older adapter stays.
    """
    report, state = report_of(model), adapter_state(model)
    tensors = state.tensors | {EXTRA + name: tensor for name, tensor in (extra or {}).items()}
    stored = report.stored_bases
    config = {
        "format_version": FORMAT_VERSION,
        **report.adapter.describe(),
        **generator_facts(report),
        "targets": report.targets,
        "layers": {row.layer: list(row.shape) for row in report.rows},
        "trained": state.trained,
        "kept": sorted(state.kept),
        "base_model": {**(base_model or {}), "weights_sha256_sampled": state.base_hash},
        "metadata": dict(metadata or {}),
    }
    path = Path(path).absolute()
    values = {name: cast(tensor.detach().cpu(), dtype) for name, tensor in tensors.items()}
    container.write(path, Contents(config, values, {} if stored is None else stored.tensors()))
    return path


def copy_adapter(source: Path, path: Path, dtype: torch.dtype | None = None) -> int:
    """Writes a checked adapter once more, as a folder or one file, in another dtype or as it is.

    Returns:
        The bytes written.
    """
    read_adapter(source)
    contents = container.read(source)
    tensors = {name: cast(tensor, dtype) for name, tensor in contents.tensors.items()}
    container.write(path.absolute(), Contents(without_local_paths(contents.config), tensors, contents.bases))
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of numbers in another dtype, if one is given."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def read_adapter(path: str | os.PathLike[str], name: str | None = None) -> AdapterFile:
    """Reads an adapter without a model.

    Args:
        path: The folder, or one ``.safetensors`` file.
        name: What messages call it; the path by default.

    Raises:
        UserError: If something is missing, damaged, or of another format.
    """
    file, path = Path(path), Path(name or path)
    contents = container.read(file, path)
    config = contents.config
    version = config.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this version reads up to {FORMAT_VERSION}: update randlora-pl.")
    if isinstance(version, int) and version < OLDEST_FORMAT:
        raise UserError(f"{path} has format {version}, which is no longer read. Train the adapter again.")
    if damaged := container.changed(contents):
        what = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
        raise UserError(
            f"{path} is damaged or was changed after it was saved ({what}): copy it again, or delete "
            f'"sha256" in its {CONFIG} to take it as it is.'
        )
    check_adapter_schema(config, path)
    adapter = make_adapter(config["method"], config["options"], path)
    shapes = config.get("layers", {})
    if not isinstance(adapter, BaseWeightMethod) and (not shapes or {len(shape) for shape in shapes.values()} != {2}):
        raise UserError(f"{path} is damaged or was changed: its layers have no names and shapes; copy it again.")
    if odd := [name for name, shape in shapes.items() if min(shape, default=1) < 1 or math.prod(shape) > LARGEST]:
        raise UserError(f"{path} is damaged or was changed: layer {odd[0]} is {brief(shapes[odd[0]])}; copy it again.")
    if absent := [name for name in config.get("kept", []) if name not in contents.tensors]:
        raise UserError(f"{path} is damaged or was changed: it keeps {absent[0]} and does not hold it; copy it again.")
    trained = {name: value for name, value in contents.tensors.items() if name not in config.get("kept", [])}
    if odd := [name for name, value in trained.items() if not value.is_floating_point()]:
        raise UserError(f"{path} is damaged or was changed: {odd[0]} is {trained[odd[0]].dtype}; copy it again.")
    extra = {name.removeprefix(EXTRA): value for name, value in contents.tensors.items() if name.startswith(EXTRA)}
    own = {name: value for name, value in contents.tensors.items() if not name.startswith(EXTRA)}
    return AdapterFile(file, adapter, config.get("targets"), own, extra, config, _stored_bases(path, contents))


def _stored_bases(path: Path, contents: Contents) -> Bases | None:
    """The bases that came along, if the seed does not give them.

    Raises:
        UserError: They are missing, or not those that the adapter was trained with.
    """
    if contents.config.get("generator") != STORED:
        return None
    if contents.bases.keys() != {"A", "B"} or any(tensor.dim() != 3 for tensor in contents.bases.values()):
        raise UserError(f"{path} needs the bases A and B in {BASES}, which no seed gives; copy the whole folder again.")
    a, b = (contents.bases[name].float() for name in ("A", "B"))
    bases = Bases(0, a, b, stored=True)
    if bases.fingerprint != contents.config.get("fingerprint"):
        there, here = str(contents.config.get("fingerprint"))[:12], bases.fingerprint[:12]
        raise UserError(f"{path}: its stored bases are {here}, it was trained with {there}; copy it again.")
    return bases


def make_adapter(method: str, options: Mapping[str, Any], source: object, hint: str = OTHER_VERSION) -> Adapter:
    """An adapter from its name and JSON options.

    Args:
        method: Its name.
        options: Its options.
        source: Where they were read, for messages.
        hint: What to do about an option of another type, for the message.

    Raises:
        UserError: If the method or one of its options is unknown; ``source`` is named as the place.
    """
    if method not in METHODS:
        raise UserError(f"{source}: method {method!r} is unknown; this version knows {', '.join(METHODS)}.")
    made = dict(options)
    try:
        if "inner" in made:
            made["inner"] = make_adapter(made["inner"]["method"], made["inner"]["options"], source, hint)
        adapter = METHODS[method](**made)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(f"{source}: {method} does not take these options ({error}).") from None
    check_arguments(METHODS[method].__init__, made, f"{source}, options of {method}", hint)
    return adapter


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> AdapterFile:
    """Injects a saved adapter into its base model, or reloads it where the same one is in place.

    The updates take the mode of the model, train or eval; a model for prediction is put into eval mode before.

    Example:
        >>> model = timm.create_model("resnet18", pretrained=True, num_classes=10).eval()
        >>> load_adapter(model, "runs/cars/adapter")

    Args:
        model: The base model, with the weights that the adapter was trained on.
        path: The adapter folder, or one ``.safetensors`` file.

    Returns:
        What was read, with the head and metadata that it carries.

    Raises:
        UserError: If the file or the model does not fit; every mismatch is named, the model is unchanged.
    """
    file = read_adapter(path)
    place_adapter(model, file)
    return file


def place_adapter(model: nn.Module, file: AdapterFile) -> None:
    """What `load_adapter` does with an adapter that was read.

    Raises:
        UserError: If the model does not fit; every mismatch is named, the model is unchanged.
    """
    present = getattr(model, "adapter_report", None)
    adapted = isinstance(present, InjectionReport)
    found = differences(file, model, present) if isinstance(present, InjectionReport) else problems(file, model)
    if found:
        told = [line.rstrip(".") for line in found[:6]] + ([f"and {len(found) - 6} more"] if len(found) > 6 else [])
        end = "" if told[-1].endswith("?") else "."
        raise UserError(f"{file.path} does not fit this model: {'; '.join(told)}{end}")
    if not adapted:
        inject(model, file.adapter, targets_in(file, model), file.trained)
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    unmerge(model)
    if file.bases is not None:
        use_bases(model, file.bases)
    reset_buffers(model)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in file.tensors.items():
            own[name].copy_(tensor)
    forget_computed(model)
    for layer in merged:
        layer.merge()
