"""Files of PEFT adapters, and their import with the same outputs.

The files are `adapter_config.json` and `adapter_model.safetensors`. No pickle is loaded. Each key of a config is read,
harmless or an error; none is ignored silently. The tensors of the file define the layers; the targets in the config are
only checked against them. Each method converts its own form (`Adapter.from_peft`).
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

import torch
from torch import Tensor, nn

from randlora_pl.adapters import Adapter, methods, save_load
from randlora_pl.adapters.base import Layers, PeftContent, PeftForm
from randlora_pl.adapters.sites import Site
from randlora_pl.interop.external import TASK, ExternalAdapter, sites_by_name
from randlora_pl.utils.adapter_schema import BaseModel
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import atomic_folder, disk_errors, parse_json
from randlora_pl.utils.options import misfit

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "head.safetensors"
"""Our file next to PEFT's, with the tensors of a head; PEFT ignores it, as it does `TASK`."""

_PREFIX = "base_model.model."
"""Prefix of the base model's names in a PEFT file."""

_FILES = {CONFIG, TENSORS, TASK, HEAD, "README.md"}


class _Arguments(TypedDict, total=False):
    """Arguments of a task that are used before its class is known."""

    seed: int
    img_size: int | None


class _Task(TypedDict, total=False):
    """Content of `TASK`; further keys are allowed."""

    task: str
    arguments: _Arguments
    classnames: list[str]
    templates: list[str]
    several_labels: bool
    base_model: BaseModel


@dataclass(frozen=True)
class PeftAdapter:
    """Contents of a PEFT adapter, read from ``path``.

    Names of tensors are without the base model's prefix, shared bases ``randlora_A`` and so on. The head outside PEFT's
    file, and the task with its arguments, class names and prompts, are stored next to it.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    head: dict[str, Tensor] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def read_peft(path: str | os.PathLike[str], name: str | None = None) -> PeftAdapter:
    """Read a PEFT adapter from its folder; messages have ``name``, by default the path.

    Raises:
        UserError: The folder is not a PEFT adapter, has a pickle, or cannot be read.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path} is not a PEFT adapter: it has no {CONFIG}. Pass the folder written by save_pretrained."
        )
    if not (path / TENSORS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise UserError(
                f"{path} has its tensors as a pickle (adapter_model.bin), which can run code when it is opened. "
                "If you trust it, load it with PEFT and save it again: model.save_pretrained(DIR)"
            )
        ours = (
            " It is an adapter of this program: use load_adapter." if (path / "adapter.safetensors").is_file() else ""
        )
        raise UserError(f"{path} is not a PEFT adapter: it has no {TENSORS}.{ours}")
    config = _json(path / CONFIG)
    if "peft_type" not in config:
        raise UserError(f"{path / CONFIG} has no peft_type, so the method is unknown; copy it again.")
    stored = save_load.load_tensors(path / TENSORS).items()
    inner = {name.removeprefix(_PREFIX).removeprefix("base_model."): tensor for name, tensor in stored}
    head = save_load.load_tensors(path / HEAD) if (path / HEAD).is_file() else {}
    task = _json(path / TASK) if (path / TASK).is_file() else {}
    if wrong := misfit(task, _Task):
        raise UserError(f"{path / TASK}: {wrong}; copy it again.")
    return PeftAdapter(config, inner, head, task, Path(name or path))


def _json(file: Path) -> dict[str, Any]:
    try:
        value = parse_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}); copy it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object; copy it again.")
    return value


@contextmanager
def write_peft(adapter: PeftAdapter, path: Path) -> Iterator[Path]:
    """Write a PEFT adapter under a temporary name and rename it if the block succeeds.

    Yields:
        Temporary folder, for verification.

    Raises:
        UserError: The path has other files than a PEFT adapter's, or cannot be written.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - _FILES):
        raise UserError(f"{path} has files that are not a PEFT adapter's; nothing was written. Choose a new folder.")
    with disk_errors(path), atomic_folder(path) as part:
        (part / CONFIG).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
        # shared bases belong to PEFT's model, all else to a module of the base model
        whole = {f"{_PREFIX if '.' in name else 'base_model.'}{name}": t for name, t in adapter.tensors.items()}
        for name, tensors in {TENSORS: whole, HEAD: adapter.head}.items():
            if tensors:
                own = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
                save_load.save_tensors(own, part / name)
        if adapter.task:
            (part / TASK).write_text(json.dumps(adapter.task, indent=2) + "\n")
        yield part


def named_base(adapter: PeftAdapter) -> tuple[str, str | None] | None:
    """Return name and weights of the base model of an adapter; None if no library here is known to have it.

    Local paths are not taken: the adapter may come from a stranger.
    """
    own = adapter.task.get("base_model")
    if isinstance(own, dict):
        name, tag = own.get("name"), own.get("pretrained")
        if not _is_id(name) or not _is_id(tag) or own.get("sha256"):
            return None
        return name, None if tag == name else tag
    whole = adapter.config.get("base_model_name_or_path")
    if not _is_id(whole):
        return None
    if adapter.config.get("task_type") == "CAUSAL_LM":
        return whole, None
    owner, _, name = whole.rpartition("/")
    return (name, "timm") if owner == "timm" else None


def _is_id(value: object) -> TypeGuard[str]:
    """Return True for a name or id of a model that is not also a path here, nor one such as ``local-dir:PATH``."""
    if not isinstance(value, str) or not re.fullmatch(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", value, re.ASCII):
        return False
    return not Path(value).exists()


_HARMLESS = {  # origin, initialization and training
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "init_weights", "runtime_config", "ensure_weight_tying", "megatron_core", "qalora_group_size"),
    *("eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    "fan_in_fan_out",  # for transformers' Conv1D, recognized by its class here and in PEFT
}
_TARGETS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}

PATIENCE = 5.0
"""Seconds for the regular expressions of a config; ordinary ones take milliseconds."""

_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        try:
            re.match(pattern, name)
        except (re.error, RecursionError, OverflowError):
            break
"""


def import_peft(
    path: str | os.PathLike[str], model: nn.Module, *, bases_dtype: torch.dtype = torch.bfloat16
) -> nn.Module:
    """Load a PEFT adapter into its base model as one of ours, in place.

    Args:
        path: Folder written by ``save_pretrained``: a method that this program has, too.
        model: Base model of any library, with the same layer names as in PEFT.
        bases_dtype: Dtype in which PEFT drew the bases of a RandLoRA adapter without stored bases; float16 if it was
            trained without bfloat16 (see `draw_peft_randlora`).

    Returns:
        Model, ready for `save_adapter`, training or merging.

    Raises:
        UserError: The adapter cannot be converted exactly, or does not fit. The model is not changed.
    """
    translate(read_peft(path), model, bases_dtype).inject(model)
    return model


def translate(adapter: PeftAdapter, model: nn.Module, bases_dtype: torch.dtype = torch.bfloat16) -> ExternalAdapter:
    """Convert a PEFT adapter, and check it against its model.

    Raises:
        UserError: As for `import_peft`.
    """
    kind, source = check_config(adapter), str(adapter.path)
    assert kind.peft is not None
    _check_patterns(adapter, (name for name, _ in model.named_modules()))
    modules = "|".join(map(re.escape, adapter.config.get("modules_to_save") or []))  # trained completely
    extra = {name: t for name, t in adapter.tensors.items() if modules and re.match(rf"(?:.*\.)?(?:{modules})\.", name)}
    tensors = {name: tensor for name, tensor in adapter.tensors.items() if name not in extra}
    by_layer, shared = _by_layer(tensors, kind.peft, source)
    known = sites_by_name(model, convolutions=kind.peft.convolutions)
    sites = {name: _site(adapter, known, model, name) for name in by_layer}
    _check_targets(adapter, model, set(by_layer))
    for layer, own in by_layer.items():
        needed = [name.removesuffix(".weight") for name in kind.peft.tensors]
        if missing := [name for name in needed if name not in own]:
            raise UserError(f"{source}: {missing[0]} of {layer} is missing; it is damaged, copy it again.")
    pair = None  # of bases; drawn from the seed without them
    if any(shared.values()):
        if missing := [name for name, copies in shared.items() if not copies]:
            raise UserError(f"{source}: {missing[0]} is missing; it is damaged, copy it again.")
        for name, (first, *others) in shared.items():
            if not all(torch.equal(first, other) for other in others):
                raise UserError(f"{source}: its copies of {name} differ; it is damaged.")
        a, b = (copies[0] for copies in shared.values())
        pair = a, b
    elif shared and adapter.config.get("save_projection", True):
        raise UserError(f"{source}: its bases are missing, although save_projection is set.")
    content = PeftContent(
        source,
        adapter.config,
        {site.shape.layer: by_layer[name] for name, site in sites.items()},
        {site.shape.layer: site.shape for site in sites.values()},
        {
            site.shape.layer: f"{name}.in_proj_weight" if site.shape.layer == f"{name}.in_proj" else name
            for name, site in sites.items()
        },
        frozenset(site.shape.layer for site in sites.values() if site.transposed),
        pair,
        bases_dtype,
    )
    external = ExternalAdapter(source, *kind.from_peft(content), extra)
    external.check(model)
    return external


def check_config(adapter: PeftAdapter) -> type[Adapter]:
    """Return the method of a PEFT adapter after checking that its whole config can be converted.

    Raises:
        UserError: The method, or an option that changes the outputs, is not supported.
    """
    config, path = adapter.config, adapter.path
    name = str(config["peft_type"]).upper()
    ours: list[type[Adapter]] = [getattr(methods, each) for each in methods.__all__]
    known = {kind: kind.peft for kind in ours if kind.peft is not None}
    kinds = {kind: form for kind, form in known.items() if form.name == name}
    if not kinds:
        names = ", ".join(sorted((kind.method() for kind in known), key=str.lower))
        raise UserError(f"{path} is a {name} adapter; {names} can be imported.")
    named = [kind for kind, form in kinds.items() if form.when is not None and form.when(config)]
    kind = next(iter([*named, *(kind for kind, form in kinds.items() if form.when is None)]))
    form = kinds[kind]
    _check_kinds(
        {k: v for k, v in config.items() if (form.least_rank, k, type(v)) != (None, "rank_pattern", dict)}, path
    )
    if form.least_rank is not None and (type(config.get("r")) is not int or config["r"] < form.least_rank):
        raise UserError(
            f"{path}: r is {brief(config.get('r'))} in its config, not a positive whole number; copy it again."
        )
    for key, value in config.items():
        if key in _HARMLESS | _TARGETS | form.keys or not value or (key == "bias" and value == "none"):
            continue
        raise UserError(
            f"{path}: its config has {key}: {brief(value)}, which changes the outputs and has no counterpart here. "
            "Merge it with PEFT instead: model.merge_and_unload()"
        )
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in form.starts:
        raise UserError(
            f"{path}: init_lora_weights {start!r} changes the base weights. Write it as a plain LoRA first: "
            "model.save_pretrained(DIR, path_initial_model_for_weight_conversion=START)"
        )
    return kind


class _Kinds(TypedDict, total=False):
    """Types of the keys that are more than a number or a switch."""

    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    modules_to_save: list[str] | None
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    layers_pattern: list[str] | str | None
    target_parameters: list[str] | None


def _check_kinds(config: dict[str, Any], path: Path) -> None:
    """Check value types, ranks of at least 1, and the syntax of patterns."""
    wrong: object = misfit(config, _Kinds)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if wrong is None and (low := next((pattern for pattern, rank in ranks.items() if rank < 1), None)) is not None:
        wrong = f"rank_pattern.{low} is {brief(ranks[low])}"
    for pattern in () if wrong else (*ranks, *alphas):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            wrong = f"the pattern {brief(pattern)} is not a regular expression"
    if wrong is not None:
        raise UserError(f"{path}: {wrong} in its config; copy it again.")


def _check_patterns(adapter: PeftAdapter, names: Iterable[str]) -> None:
    """Match the regular expressions of a config in another process first, for `PATIENCE`: they may take forever."""
    config = adapter.config
    forms = {"target_modules": "({})$", "exclude_modules": "({})$", "layers_pattern": r".*\.{}\.(\d+)\."}
    forms |= dict.fromkeys(("rank_pattern", "alpha_pattern"), r"(.*\.)?({})$")  # as PEFT does
    given = {key: [config[key]] if isinstance(config.get(key), str) else config.get(key) or () for key in forms}
    patterns = [
        forms[key].format(text)
        for key, texts in given.items()
        for text in texts
        if not re.fullmatch(r"[\w.-]*", text)  # a plain name takes no time
    ]
    if not patterns:
        return
    try:
        command = [sys.executable, "-I", "-S", "-c", _MATCH_ALL]
        work = json.dumps([patterns, list(names)])
        subprocess.run(command, input=work, text=True, capture_output=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{adapter.path}: the regular expressions in its config take too long. Write the layers as a list of names "
            "in target_modules, if you trust it."
        ) from None


def _by_layer(tensors: Mapping[str, Tensor], form: PeftForm, source: str) -> tuple[Layers, dict[str, list[Tensor]]]:
    """Return the tensors of each layer by PEFT's short names, and every copy of the shared bases."""
    shared: dict[str, list[Tensor]] = {name: [] for name in form.shared}
    layers: Layers = {}
    names = "|".join(re.escape(name.removesuffix(".weight")) for name in form.tensors)
    for name, tensor in tensors.items():
        if (short := name.rpartition(".")[2]) in shared:
            shared[short].append(tensor)
            continue
        known = re.fullmatch(rf"(.*)\.({names})(?:\.weight)?", name)
        if known is None or (".base_layer." in known[1]):
            raise UserError(
                f"{source}: the tensor {name} does not belong to an update of a linear layer, and would be lost. Merge "
                "it with PEFT instead: model.merge_and_unload()"
            )
        layers.setdefault(known[1], {})[known[2]] = tensor.float() if tensor.is_floating_point() else tensor
    if not layers:
        raise UserError(f"{source} has no tensors of {form.name}; copy it again.")
    return layers, shared


def _site(adapter: PeftAdapter, sites: dict[str, Site], model: nn.Module, name: str) -> Site:
    """Return the site of one of PEFT's layers; packed attention weights must be ``target_parameters``."""
    if f"{name}.in_proj" in sites:
        parameters = adapter.config.get("target_parameters") or []
        if not any(f".{name}.in_proj_weight".endswith(f".{parameter}") for parameter in parameters):
            raise UserError(
                f"{adapter.path}: PEFT's LoRA of {name} (nn.MultiheadAttention) is not an update of its weights: the "
                "output projection's part acts twice. Merge it with PEFT instead: model.merge_and_unload()"
            )
        return sites[f"{name}.in_proj"]
    if name in sites:
        return sites[name]
    try:
        kind = type(model.get_submodule(name)).__name__
    except AttributeError:
        raise UserError(
            f"{adapter.path}: its target {name} does not exist in this model ({type(model).__name__}); its layers are "
            f"named like {next(iter(sites), 'nothing')!r}. Use the model that it was trained on."
        ) from None
    raise UserError(
        f"{adapter.path}: its target {name} is a {kind}; only updates of linear layers, and LoRA and HiRA of plain "
        "convolutions, can be imported."
    )


def _check_targets(adapter: PeftAdapter, model: nn.Module, layers: set[str]) -> None:
    """Check that the file has all layers of the config."""
    config = adapter.config
    targets = config.get("target_modules") or []
    if targets == "all-linear" or any(
        config.get(key) is not None for key in ("layers_to_transform", "exclude_modules")
    ):
        return
    saved = config.get("modules_to_save") or []

    def meant(name: str) -> bool:
        if any(re.match(rf"(?:^|.*\.){re.escape(module)}(?:$|\..*)", name) for module in saved):
            return False
        if isinstance(targets, str):
            return re.fullmatch(targets, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in targets)

    try:
        missing = [name for name, _ in model.named_modules() if meant(name) and name not in layers]
    except (re.error, TypeError):
        raise UserError(f"{adapter.path}: target_modules is {targets!r} in its config; copy it again.") from None
    if missing:
        raise UserError(
            f"{adapter.path}: {len(missing)} layers in its config have no tensors ({missing[0]} ...); it "
            "is damaged, or belongs to another model."
        )
