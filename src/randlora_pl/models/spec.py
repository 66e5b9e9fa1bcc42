"""Image preprocessing and identity of a model. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.image_spec import ImageSpec as ImageSpec

_TIMM_MODES = {"center": "shortest", "border": "longest", "squash": "squash"}


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of a base model, sufficient to build it again and to reject adapters of other models.

    Attributes:
        library: ``"open_clip"``, ``"timm"`` or ``"transformers"``.
        name: Architecture, after correction (for instance ``ViT-B-32-quickgelu``), ``hf-hub:ORG/NAME``, or
            ``local-dir:NAME`` of a folder.
        pretrained: A tag, the name of a file, or ``"random"``.
        image_size: Height and width in pixels that the model was built for; only for image models.
        seed: Seed of the initialization; only for random weights.
        sha256: SHA-256 of the weights file, by which `weights_files` finds it; only for a file.
        config_sha256: SHA-256 of the configuration file; only for a folder or a repository of the Hub.
    """

    library: str
    name: str
    pretrained: str
    image_size: int | None = None
    seed: int | None = None
    sha256: str | None = None
    config_sha256: str | None = None

    def as_dict(self) -> dict[str, str | int]:
        """Return the fields that are not None, as JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def open_clip_spec(values: Mapping[str, Any], size: int, owner: str) -> ImageSpec:
    """Return the preprocessing that open_clip's ``image_transform_v2`` makes of a preprocessing configuration.

    Args:
        values: open_clip's ``preprocess_cfg`` or its entry of a tag; keys that are missing or None get its defaults.
        size: Height and width in pixels.
        owner: Name of the model, for messages.

    Raises:
        UserError: A value is unknown or impossible.
    """
    usual = ImageSpec()
    known = {key: value for key, value in values.items() if value is not None}
    mode = known.get("mode", "RGB")
    if mode != "RGB":
        raise UserError(f"{owner}: its preprocessing of images has the mode {brief(mode)}. Only RGB is supported.")
    interpolation, resize = known.get("interpolation", "bicubic"), known.get("resize_mode", "shortest")
    return ImageSpec(
        size,
        _three(known.get("mean", usual.mean)),
        _three(known.get("std", usual.std)),
        "bicubic" if interpolation == "random" else interpolation,  # as in open_clip, outside of training
        resize,
        fill=_three(known.get("fill_color", 0)) if resize == "longest" else usual.fill,
    ).checked(owner)


def timm_spec(values: Mapping[str, Any], size: int, owner: str) -> ImageSpec:
    """Return the preprocessing that ``timm.data.create_transform`` makes of a data configuration.

    Args:
        values: Result of ``timm.data.resolve_data_config``.
        size: Height and width in pixels.
        owner: Name of the model, for messages.

    Raises:
        UserError: A value is unknown or impossible.
    """
    mean, mode = _three(values["mean"]), values["crop_mode"]
    resize = _TIMM_MODES.get(mode, mode) if isinstance(mode, str) else mode
    spec = ImageSpec(size, mean, _three(values["std"]), values["interpolation"], resize, values["crop_pct"]).checked(
        owner
    )
    return spec if spec.resize != "longest" else spec.filled_with_mean()


def _three(value: Any) -> Any:
    """Return a color as a tuple; one number stands for three."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value, value)
