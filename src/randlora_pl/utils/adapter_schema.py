"""JSON schema of adapter files, checked on reading so that later code can rely on it."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NotRequired, TypedDict

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.options import Misfit, misfit

FORMAT_VERSION = 4
"""Format of adapter files."""


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
    """Metadata of an adapter; a task saves its name, arguments, class names and templates. Further keys are allowed."""

    task: str
    task_class: str  # path of a class from outside
    arguments: dict[str, Any]
    classnames: list[str]
    templates: list[str]
    typed_templates: bool
    captions: bool
    several_labels: bool
    prompts: Prompts
    training: Training
    made_from: dict[str, Any]


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
        UserError: A value does not fit; the message has the first one.
    """
    wrong: Misfit | str | None = misfit(config, AdapterSchema)
    if wrong is None and "task" in (metadata := config.get("metadata", {})):
        missing = [name for name in ("arguments", "classnames", "templates") if name not in metadata]
        wrong = Misfit(f"metadata.{missing[0]}", None, "") if missing else None
        for name in ("classnames", "templates") if wrong is None else ():
            # Half of a character cannot be encoded; undecodable bytes of a file name (surrogate escapes) can.
            half = (text for text in metadata[name] if re.search("[\ud800-\udc7f\udd00-\udfff]", text))
            wrong = wrong or next((Misfit(f"metadata.{name}", text, "text") for text in half), None)
    if wrong is None and (frame := config.get("metadata", {}).get("training", {}).get("frame")):
        problem = ImageSpec.of_values(frame).problem()
        wrong = f"metadata.training.frame has {problem}" if problem else None
    if wrong is not None:
        raise UserError(f"{source} is damaged or was changed: {wrong}. Copy it again, or save it again.")


OTHER_VERSION = "it was written by another version, is damaged, or was changed"
"""End of messages about an argument that does not fit."""


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any], source: object) -> None:
    """Raise an error if an argument from a file is unknown to a function or has the wrong type.

    Args:
        function: A function or class with annotated parameters.
        values: Arguments by name, from JSON or YAML.
        source: File that the values were read from, for the message.

    Raises:
        UserError: An argument does not fit; the message has the first one.
    """
    hints = {name: option.annotation for name, option in inspect.signature(function).parameters.items()}
    unknown = next((f"{name} is unknown" for name in values if name not in hints), None)
    wrong = unknown or next((part for name in values if (part := misfit(values[name], hints[name], name))), None)
    if wrong is not None:
        raise UserError(f"{source}: {wrong}; {OTHER_VERSION}.")


def method_label(config: Mapping[str, Any]) -> str:
    """Return what trained an adapter: ``CoOp``, ``MaPLe + DePT``, ``CoOp + RandLoRA``, or the method alone."""
    arguments = config.get("metadata", {}).get("arguments", {})
    parts = [part["method"] for name in ("prompts", "head") if isinstance(part := arguments.get(name), dict)]
    method = str(config["method"])
    return " + ".join(parts if parts and not config.get("layers") else [*parts, method])
