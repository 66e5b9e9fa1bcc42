"""JSON schema of adapter files, checked on reading so that later code can rely on it."""

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.image_spec import ImageSpec

FORMAT_VERSION = 4
"""Format of adapter files."""

_LARGEST = 2**63 - 1


class Frame(TypedDict):
    """Preprocessing of the training images."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"]
    resize: Literal["shortest", "longest", "squash"]
    crop_pct: float
    fill: tuple[int, int, int]
    background: NotRequired[Literal["white", "black", "mean"]]


class Training(TypedDict):
    """Metrics of a training run, and the preprocessing of its images."""

    frame: NotRequired[Frame]


class Prompts(TypedDict, total=False):
    """Prompts of the training and of the evaluation."""

    training: list[str]
    evaluation: list[str]
    drawn: bool
    learned: str


class Metadata(TypedDict, total=False):
    """Optional metadata of an adapter; further keys are allowed."""

    arguments: dict[str, Any]
    classnames: list[str]
    templates: list[str]
    typed_templates: bool
    captions: bool
    prompts: Prompts
    training: Training
    made_from: dict[str, Any]


class TaskMetadata(TypedDict):
    """Required metadata of an adapter that a task has saved; ``task_class`` is the path of a class from outside."""

    task: str
    task_class: NotRequired[str]
    arguments: dict[str, Any]
    classnames: list[str]
    templates: list[str]


class BaseModel(TypedDict, total=False):
    """Identity of the base model (`ModelIdentity`), with a hash of sampled weights."""

    library: str
    name: str
    pretrained: str
    image_size: int | None
    seed: int | None
    sha256: str | None
    config_sha256: str | None
    weights_sha256_sampled: str | None


class AdapterSchema(TypedDict):
    """Content of ``adapter_config.json``."""

    format_version: int
    method: str
    options: dict[str, Any]
    generator: NotRequired[str | None]
    seed: NotRequired[int | None]
    fingerprint: NotRequired[str | None]
    targets: NotRequired[list[str] | None]
    layers: NotRequired[dict[str, list[int]]]
    trained: NotRequired[list[str] | None]
    kept: NotRequired[list[str]]
    derived: NotRequired[dict[str, list[float]]]
    base_model: NotRequired[BaseModel]
    metadata: NotRequired[Metadata]


def check_format(config: Mapping[str, Any], source: object) -> None:
    """Refuse an adapter file of another format.

    Args:
        config: Content of ``adapter_config.json``.
        source: Path of the adapter, for the message.

    Raises:
        UserError: The file has another format.
    """
    version = config.get("format_version")
    if isinstance(version, int) and version != FORMAT_VERSION:
        raise UserError(
            f"{source} has format {version}, this version reads format {FORMAT_VERSION}. Install the randlora-pl that "
            "wrote it, or train the adapter again."
        )


def check_adapter_schema(config: Mapping[str, Any], source: object) -> None:
    """Raise an error if a key is missing, a value has the wrong type, or no image can be prepared as stored.

    Args:
        config: Content of ``adapter_config.json``.
        source: Path of the adapter, for the message.

    Raises:
        UserError: A value does not fit; the message names the first one.
    """
    wrong = misfit(config, AdapterSchema)
    if wrong is None and "task" in (metadata := config.get("metadata", {})):
        wrong = misfit(metadata, TaskMetadata, "metadata") or _half_character(metadata)
    if wrong is None and (frame := config.get("metadata", {}).get("training", {}).get("frame")):
        problem = ImageSpec.of_values(frame).problem()
        wrong = f"metadata.training.frame has {problem}" if problem else None
    if wrong is not None:
        raise UserError(f"{source} is damaged or was changed: {wrong}. Copy it again, or save it again.")


def _half_character(metadata: TaskMetadata) -> str | None:
    """Return the key of a text that cannot be encoded, or None.

    Undecodable bytes of a file name (surrogate escapes) are allowed.
    """
    for name, texts in (("classnames", metadata["classnames"]), ("templates", metadata["templates"])):
        for text in texts:
            try:
                text.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError:
                return _is(f"metadata.{name}", text)
    return None


OTHER_VERSION = "it was written by another version, is damaged, or was changed"
"""Default end of the messages of `check_arguments`."""


def check_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], source: object, hint: str = OTHER_VERSION
) -> None:
    """Raise an error if an argument from a file is unknown to a function or has the wrong type.

    Args:
        function: A function or class with annotated parameters.
        values: Arguments by name, from JSON or YAML.
        source: File that the values were read from, for the message.
        hint: End of the message.

    Raises:
        UserError: An argument does not fit; the message names the first one.
    """
    hints = {name: option.annotation for name, option in inspect.signature(function).parameters.items()}
    name = next((name for name in values if name not in hints), None)
    wrong = f"{name} is unknown" if name is not None else None
    wrong = wrong or next(
        (found for name, value in values.items() if (found := misfit(value, hints[name], name))), None
    )
    if wrong is not None:
        raise UserError(f"{source}: {wrong}; {hint}.")


def misfit(value: Any, hint: Any, name: str = "") -> str | None:
    """Return the first mismatch between a JSON value and a type annotation, or None.

    Args:
        value: JSON value.
        hint: A type, union, literal, list, tuple, dictionary, or typed dictionary (further keys are allowed).
        name: Name of the value in the message.
    """
    kind, inner = get_origin(hint), get_args(hint)
    prefix = f"{name}." if name else ""
    if hint is Any or hint is inspect.Parameter.empty or isinstance(hint, str):  # an own class may have no types
        return None
    if kind in (Union, types.UnionType):
        return None if any(misfit(value, each) is None for each in inner) else _is(name, value)
    if kind is NotRequired:
        return misfit(value, inner[0], name)
    if is_typeddict(hint):
        if not isinstance(value, dict):
            return _is(name, value)
        if missing := sorted(hint.__required_keys__ - value.keys()):
            return f"{prefix}{missing[0]} is missing"
        parts = [(value[key], each, prefix + key) for key, each in get_type_hints(hint).items() if key in value]
    elif kind is Literal:
        return None if value in inner and type(value) in {type(each) for each in inner} else _is(name, value)
    elif kind is dict:
        if not isinstance(value, dict):
            return _is(name, value)
        parts = [(each, inner[1], f"{prefix}{key}") for key, each in value.items()]
    elif kind is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            return _is(name, value)
        parts = [(each, part, name) for each, part in zip(value, inner, strict=True)]
    elif kind is list:
        if not isinstance(value, list):
            return _is(name, value)
        parts = [(each, inner[0], f"{name}[{index}]") for index, each in enumerate(value)]
    else:
        if isinstance(value, int) and abs(value) > _LARGEST:  # float() and torch would overflow
            return _is(name, value)
        known: Any = {float: (int, float), type(None): type(None)}.get(hint, hint)
        checked = isinstance(known, type | tuple)  # not of an own class, whose types may be any
        fits = not checked or (isinstance(value, known) and (hint is bool or not isinstance(value, bool)))
        return None if fits else _is(name, value)
    return next((found for part in parts if (found := misfit(*part))), None)


def _is(name: str, value: Any) -> str:
    return f"{name} is {brief(value, 40)}"


def method_label(config: Mapping[str, Any]) -> str:
    """Return the names of what trained: ``CoOp``, ``MaPLe + DePT``, ``CoOp + RandLoRA``, or the method alone.

    Args:
        config: Description of an adapter.
    """
    arguments = config.get("metadata", {}).get("arguments", {})
    parts = [part["method"] for name in ("prompts", "head") if isinstance(part := arguments.get(name), dict)]
    method = str(config["method"])
    return " + ".join(parts if parts and method == "Frozen" else [*parts, method])
