"""Saving, reading and loading of adapters: a folder, or one ``.safetensors`` file with its config as metadata.

A folder contains `adapter.safetensors`, `adapter_config.json` and, for bases that no seed generates,
`bases.safetensors`. A single file has the config in its metadata and the bases under a prefix. Both are written
atomically. No pickle is loaded.

Files contain the trained tensors and the kept buffers. Random bases are not stored: the seed generates them again, and
their fingerprint is compared. Loading checks everything and reports all mismatches before it changes the model.
"""

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from randlora_pl.adapters import methods
from randlora_pl.adapters.adapter_file import EXTRA, AdapterFile, adapter_state, differences, problems
from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.derived import DerivedAdapter, derived_buffers, derived_once, sketches
from randlora_pl.adapters.described import make
from randlora_pl.adapters.injection import InjectionReport, inject
from randlora_pl.adapters.operations import adapted_layers, report_of, unmerge, use_bases
from randlora_pl.adapters.random_bases import GENERATOR, STORED, Bases
from randlora_pl.adapters.trained import forget_computed, reset_buffers
from randlora_pl.utils.adapter_schema import FORMAT_VERSION, OTHER_VERSION, check_adapter_schema, check_format
from randlora_pl.utils.errors import UserError, brief, errors_in
from randlora_pl.utils.files import atomic_folder, disk_errors, disk_size, move, parse_json, scratch_folder
from randlora_pl.utils.own_classes import METHODS, check_importable, is_own, path_of
from randlora_pl.utils.run_files import find_adapter
from randlora_pl.utils.weights_files import without_local_paths

TENSORS, CONFIG, BASES = "adapter.safetensors", "adapter_config.json", "bases.safetensors"
SUFFIX = ".safetensors"
_KEY, _PREFIX = "adapter_config", "bases."


@dataclass(frozen=True)
class Contents:
    """Content of an adapter on disk.

    Attributes:
        config: Config as JSON values.
        tensors: Trained tensors by name.
        bases: Random tensors that no seed generates; usually empty.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    bases: dict[str, Tensor] = field(default_factory=dict)


def _write_contents(path: Path, contents: Contents) -> None:
    """Write an adapter with its checksums; an older one at the path is replaced atomically, anything else stays."""
    config = {**contents.config, "sha256": checksums(contents)}
    text = json.dumps(config, indent=2) + "\n"
    if path.suffix == SUFFIX:
        if path.exists() and _config_of_file(path) is None:
            raise UserError(f"{path} is not an adapter, so nothing was written. Choose a new file.")
        tensors = contents.tensors | {_PREFIX + name: tensor for name, tensor in contents.bases.items()}
        with scratch_folder(path) as part:
            save_tensors(tensors, part / path.name, {_KEY: text})
            move(part / path.name, path)
        return
    if path.exists() and (not path.is_dir() or {e.name for e in path.iterdir()} - {TENSORS, CONFIG, BASES}):
        raise UserError(f"{path} contains more than an adapter, so nothing was written. Choose a new folder.")
    with atomic_folder(path) as part:
        (part / CONFIG).write_text(text)
        save_tensors(contents.tensors, part / TENSORS)
        if contents.bases:
            save_tensors(contents.bases, part / BASES)


def _read_contents(path: Path, name: Path | None = None) -> Contents:
    """Read an adapter; only check that its files are readable. Messages use ``name`` instead of the path."""
    name = path if name is None else name
    if path.is_file():
        source, kind, text = name, f"file: its metadata has no {_KEY}", _config_of_file(path, name)
    else:
        source, kind = name / CONFIG, f"folder: it needs {CONFIG} and {TENSORS}"
        text = (path / CONFIG).read_bytes() if (path / CONFIG).is_file() and (path / TENSORS).is_file() else None
    if text is None:
        inside = [each for each in ("adapter", "adapter-best") if (path / each).is_dir()]
        hint = f"Did you mean {path / inside[0]}?" if inside else "A run writes it to RUN/adapter."
        if path.is_file():
            hint = "Use the folder RUN/adapter, or a file of `randlora-pl adapter export --to adapter`."
        if (path / "adapter_model.safetensors").is_file():
            hint = (
                "PEFT wrote it: load it with import_peft(folder, model), or `randlora-pl adapter import --from peft`."
            )
        raise UserError(f"{name} is not an adapter {kind}. {hint}")
    try:
        config = parse_json(text)
    except ValueError as error:
        raise UserError(f"{source} cannot be read ({type(error).__name__}: {error}). Save it again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{source} cannot be read (not a JSON object). Save it again.")
    if path.is_file():
        tensors = load_tensors(path, name)
        bases = {key.removeprefix(_PREFIX): tensors.pop(key) for key in list(tensors) if key.startswith(_PREFIX)}
    else:
        tensors = load_tensors(path / TENSORS, name / TENSORS)
        bases = load_tensors(path / BASES, name / BASES) if (path / BASES).is_file() else {}
    return Contents(config, tensors, bases)


def changed_parts(contents: Contents) -> list[str]:
    """Return the names of tensors, or of the config, that changed since an adapter was saved."""
    saved = contents.config.get("sha256")
    if saved is None:  # removed on purpose after an edit of the config
        return []
    try:
        there, here = dict(saved), checksums(contents)
        return [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    except (TypeError, ValueError):
        return ["sha256"]


def checksums(contents: Contents) -> dict[str, str]:
    """Return the SHA-256 of the config and of each tensor with its dtype and shape; safetensors stores none."""
    plain = {name: value for name, value in contents.config.items() if name != "sha256"}
    text = json.dumps(json.loads(json.dumps(plain)), sort_keys=True)
    sums = {CONFIG: hashlib.sha256(text.encode()).hexdigest()}
    every = contents.tensors | {_PREFIX + name: tensor for name, tensor in contents.bases.items()}
    for name, tensor in sorted(every.items()):
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        sums[name] = digest.hexdigest()
    return sums


def _config_of_file(path: Path, name: Path | None = None) -> bytes | None:
    """Return the config in a file's metadata, or None; messages use ``name`` instead of the path."""
    with path.open("rb"):  # raises the system's error; safetensors reports every unreadable file as missing
        pass
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        path = name or path
        raise UserError(f"{path} cannot be read ({error}): truncated, damaged or not a safetensors file.") from None
    return None if text is None else text.encode()


def load_tensors(file: Path, name: Path | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU; messages use ``name`` instead of the path.

    Raises:
        UserError: The file is truncated or damaged.
        OSError: The file cannot be opened.
    """
    with file.open("rb"):  # raises the system's error
        pass
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{name or file} cannot be read ({error}): truncated or damaged. Copy it again.") from None


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: The file cannot be written, for example because the disk is full.
    """
    try:
        plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(plain, file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # contains the system's error as text
        if system := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(system[1]), os.strerror(int(system[1])), str(file)) from error
        raise


_log = logging.getLogger("randlora_pl")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOATS = {*DTYPES.values(), torch.float64}


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    base_model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    keep_derived: bool = False,
) -> Path:
    """Save the trained tensors of a model with its options and metadata; an older adapter at the path is replaced.

    Tensors whose ``requires_grad`` was set after `inject` are saved as if they were in ``trained``. A line is logged if
    the method needs a procedure between optimizer steps that was never called.

    Examples:
        >>> report = inject(model, RandLoRA(rank=6))
        >>> save_adapter(model, "adapter", metadata={"classes": ["cat", "dog"]}).name
        'adapter'

    Args:
        model: Model with an adapter, merged or not.
        path: Folder, or file whose name ends in ``.safetensors``; parent folders are created. An older adapter is
            replaced after the new one is written.
        base_model: Identity of the base model: library, name, pretrained tag.
        extra: Tensors outside the model's layers, for example a head.
        metadata: JSON values, such as class names, prompts, a summary of the training.
        dtype: Dtype of the stored tensors; by default unchanged (float32).
        keep_derived: Store tensors that the method derives from the weights (PiSSA), instead of a sketch of them.

    Returns:
        Absolute path.

    Raises:
        UserError: The model has no adapter, its file could not be loaded again, or the path contains anything other
            than an adapter.
        OSError: The adapter cannot be written, for example because the disk is full; the older adapter stays.
    """
    report = report_of(model)
    check_loads_again(report.adapter)
    state = adapter_state(model)
    if report.procedure is not None and not report.procedure.ran:
        report.procedure.ran = True  # one line is enough
        _log.warning(
            "%s trains with a procedure, which was never called. In a training loop of your own, call "
            "report.procedure.after_step(step, total) after every optimizer.step(), with the report of inject.",
            report.adapter.method(),
        )
    tensors = state.tensors | {EXTRA + name: tensor for name, tensor in (extra or {}).items()}
    adapter, derived = report.adapter, derived_buffers(model) if keep_derived else {}
    for leaf in adapter.leaves() if derived else []:
        if isinstance(leaf, DerivedAdapter):
            adapter = adapter.exchanged(leaf, leaf.replace(keep_derived=True))
    tensors |= derived
    stored = report.stored_bases
    config = {
        "format_version": FORMAT_VERSION,
        **adapter.describe(),
        "generator": GENERATOR if stored is None else STORED,
        "seed": report.adapter.key,
        "fingerprint": report.fingerprint,
        "targets": report.targets,
        "layers": {row.layer: list(row.shape) for row in report.rows},
        "trained": state.trained,
        "kept": sorted(state.kept.keys() | derived.keys()),
        "derived": sketches(model, tensors),
        "base_model": {**(base_model or {}), "weights_sha256_sampled": state.base_hash},
        "metadata": dict(metadata or {}),
    }
    path = Path(path).absolute()
    values = {name: cast(tensor.detach().cpu(), dtype) for name, tensor in tensors.items()}
    if odd := find_not_finite(values):
        raise UserError(
            f"{path} is not written, because {odd[0]} is not finite (NaN or infinity). Lower the learning rate or alpha"
            f"{'' if dtype is None else ', or leave out dtype'}."
        )
    _write_contents(path, Contents(config, values, {} if stored is None else stored.tensors()))
    return path


def check_loads_again(adapter: Adapter) -> None:
    """Refuse an adapter whose file could not be loaded again.

    Raises:
        UserError: A class cannot be imported, or its options do not give the same adapter again.
    """
    kinds = _kinds(adapter)
    if not any(map(is_own, kinds)):
        return
    for kind in kinds:
        if is_own(kind):
            check_importable(kind)
    name, described = adapter.method(), adapter.describe()
    try:
        text = json.dumps(described)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: options that cannot be saved ({error}). Use numbers, texts and lists.") from None
    again = make({path_of(kind): kind for kind in kinds}, json.loads(text), f"{name}, rebuilt from its options")
    if json.dumps(again.describe()) != text:
        raise UserError(
            f"{name} is a different adapter when it is rebuilt from its options, {brief(described['options'])}. "
            "Keep each option as it was given."
        )


def _kinds(adapter: Adapter) -> set[type[Adapter]]:
    """Return the classes of an adapter and of the adapters inside it."""
    return {type(adapter)}.union(*map(_kinds, adapter.nested()))


def copy_adapter(source: Path, path: Path, dtype: torch.dtype | None = None) -> int:
    """Write a validated adapter again, as a folder or a file, optionally in another dtype.

    Returns:
        Size in bytes.
    """
    file = read_adapter(source)
    contents = _read_contents(file.path)
    tensors = {name: cast(tensor, dtype) for name, tensor in contents.tensors.items()}
    if odd := find_not_finite(tensors):
        raise UserError(f"{source}: {odd[0]} is too large for {dtype}. Use float32 or bfloat16.")
    with disk_errors(path):
        _write_contents(path.absolute(), Contents(without_local_paths(file.config), tensors, contents.bases))
    return disk_size(path)


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a floating-point tensor in another dtype, if one is given."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def find_not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors with NaN or infinity."""
    return [name for name, each in tensors.items() if each.is_floating_point() and not each.isfinite().all()]


def read_adapter(path: str | os.PathLike[str], name: str | None = None) -> AdapterFile:
    """Read and validate an adapter without a model.

    Examples:
        >>> read_adapter("runs/cars/adapter").adapter.method()
        'RandLoRA'

    Args:
        path: Adapter folder, ``.safetensors`` file, or run folder, see `find_adapter`.
        name: Name in messages; by default the path.

    Raises:
        UserError: A part is missing, damaged, or in another format; stored bases differ from the ones of the training.
    """
    file = find_adapter(path)
    path = Path(name or file)
    contents = _read_contents(file, path)
    config = contents.config
    check_format(config, path)
    if damaged := changed_parts(contents):
        what = ", ".join(damaged[:3]) + (f" and {len(damaged) - 3} more" if len(damaged) > 3 else "")
        raise UserError(
            f"{path} is damaged or was changed after it was saved ({what}). Copy it again, or delete "
            f'"sha256" in its {CONFIG} to accept the changes.'
        )
    check_adapter_schema(config, path)
    adapter = make_adapter(config["method"], config["options"], path)
    shapes = config.get("layers", {})
    if not adapter.trains_base and (not shapes or {len(shape) for shape in shapes.values()} != {2}):
        raise UserError(f"{path} is damaged or was changed: its layers have no names and shapes. Copy it again.")
    largest = 2**34  # published weights have a few billion values at most
    if odd := [name for name, shape in shapes.items() if min(shape, default=1) < 1 or math.prod(shape) > largest]:
        raise UserError(f"{path} is damaged or was changed: layer {odd[0]} is {brief(shapes[odd[0]])}. Copy it again.")
    if absent := [name for name in config.get("kept", []) if name not in contents.tensors]:
        raise UserError(f"{path} is damaged or was changed: its kept buffer {absent[0]} is missing. Copy it again.")
    trained = contents.tensors.keys() - set(config.get("kept", []))
    for tensor_name, value in contents.tensors.items():
        if value.dtype not in FLOATS and (tensor_name in trained or value.is_floating_point()):
            raise UserError(f"{path} is damaged or was changed: {tensor_name} is {value.dtype}. Copy it again.")
    if odd := find_not_finite(contents.tensors):
        raise UserError(f"{path}: {odd[0]} is not finite (NaN or infinity). Train it again at a lower learning rate.")
    bases = None
    if config.get("generator") == STORED:
        stored = contents.bases
        if stored.keys() != {"A", "B"} or any(tensor.dim() != 3 for tensor in stored.values()):
            what = f"the bases A and B in {BASES}, which no seed generates"
            raise UserError(f"{path} needs {what}. Copy the whole folder again.")
        bases = Bases(0, stored["A"].float(), stored["B"].float(), stored=True)
        if bases.fingerprint != config.get("fingerprint"):
            there, here = str(config.get("fingerprint"))[:12], bases.fingerprint[:12]
            raise UserError(f"{path}: its stored bases are {here}, it was trained with {there}. Copy it again.")
    extra = {name.removeprefix(EXTRA): value for name, value in contents.tensors.items() if name.startswith(EXTRA)}
    own = {name: value for name, value in contents.tensors.items() if not name.startswith(EXTRA)}
    return AdapterFile(file, adapter, config.get("targets"), own, extra, config, bases)


def make_adapter(method: str, options: Mapping[str, Any], source: object, hint: str = OTHER_VERSION) -> Adapter:
    """Create an adapter from its method and JSON options.

    Raises:
        UserError: The method or an option is unknown; the message has ``source``, and ends with ``hint`` if the option
            has another type.
    """
    kinds: dict[str, type[Adapter]] = {name: getattr(methods, name) for name in methods.__all__}
    adapter = make(
        kinds,
        {"method": method, "options": options},
        source,
        hint,
        lambda path: METHODS.find(path, Adapter, methods.__all__),
    )
    assert isinstance(adapter, Adapter)
    return adapter


def load_adapter(model: nn.Module, path: str | os.PathLike[str], *, revision: str | None = None) -> AdapterFile:
    """Load an adapter into its base model, or reload its tensors if the same adapter is present.

    The updates get the mode of the model, train or eval; for prediction, call ``model.eval()`` first.

    Examples:
        >>> file = load_adapter(model.eval(), "runs/cars/adapter")
        >>> logits = model(images)

    Args:
        model: Base model, with the weights that the adapter was trained on.
        path: Adapter folder or ``.safetensors`` file, or a repository of the Hugging Face Hub, see `read_shared`.
        revision: Branch, tag or commit of the repository.

    Returns:
        The adapter file, with its head and metadata.

    Raises:
        UserError: The file or the model does not fit; every mismatch is named, the model is unchanged.
    """
    file = read_shared(path, revision)
    place_adapter(model, file)
    return file


def read_shared(path: str | os.PathLike[str], revision: str | None = None) -> AdapterFile:
    """Read an adapter from a path, or from a repository of the Hugging Face Hub.

    A text of the form USER/NAME is a repository if no file or folder of this name exists here. Its files come from the
    client's cache, or are downloaded to it; none of them is code.

    Raises:
        UserError: See `read_adapter`; or the Hub is unreachable, refuses, or has no adapter there.
    """
    if isinstance(path, str) and path.count("/") == 1 and not Path(path).exists():
        from randlora_pl.utils.hub import cached_files, names_repo

        if names_repo(path):
            with errors_in(f"{path} does not exist here"):
                folder = cached_files(path, (CONFIG, TENSORS), (BASES,), revision)
            return read_adapter(folder, path)
    if revision is not None:
        raise UserError(f"revision is {revision!r}, but {path} is not a repository of the Hub. Leave it out.")
    return read_adapter(path)


@derived_once()
def place_adapter(model: nn.Module, file: AdapterFile) -> None:
    """Load an adapter that was read into a model (see `load_adapter`).

    Raises:
        UserError: The model does not fit; every mismatch is named, the model is unchanged.
    """
    present = getattr(model, "adapter_report", None)
    adapted = isinstance(present, InjectionReport)
    mismatches = differences(file, model, present) if isinstance(present, InjectionReport) else problems(file, model)
    if mismatches:
        lines = [line.rstrip(".") for line in mismatches[:6]] + (
            [f"and {len(mismatches) - 6} more"] if len(mismatches) > 6 else []
        )
        end = "" if lines[-1].endswith("?") else "."
        raise UserError(f"{file.path} does not fit this model: {'; '.join(lines)}{end}")
    if not adapted:
        inject(model, file.adapter, file.targets, file.trained)
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
    if (procedure := report_of(model).procedure) is not None:
        procedure.ran = True  # in the training of the file
    for layer in merged:
        layer.merge()
