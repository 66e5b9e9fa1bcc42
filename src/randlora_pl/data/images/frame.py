"""Preprocessing of images for a model: size, normalization, and crop or padding to a square."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from randlora_pl.utils.errors import UserError

INTERPOLATIONS = ("bicubic", "bilinear")
RESIZES = ("crop", "pad")


class ImageSpecLike(Protocol):
    """Image format of a model (`randlora_pl.models.spec.ImageSpec`)."""

    @property
    def size(self) -> int:
        """Height and width in pixels."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel in [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel in [0, 1]."""

    @property
    def interpolation(self) -> str:
        """``bicubic`` or ``bilinear``."""

    @property
    def resize(self) -> str:
        """``crop`` or ``pad``."""


@dataclass(frozen=True)
class Frame:
    """Image preprocessing; the default is CLIP's.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel in [0, 1].
        std: Standard deviation of each channel in [0, 1].
        interpolation: ``bicubic`` or ``bilinear``.
        resize: ``crop`` resizes the shorter side and crops the center. ``pad`` resizes the longer side and fills the
            rest of the square with the mean color.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize: str = "crop"

    @classmethod
    def of(cls, spec: ImageSpecLike | None, options: Mapping[str, Any] = MappingProxyType({})) -> "Frame":
        """Return the preprocessing of a model, with options that are not None in place of its own values.

        Raises:
            UserError: The size is not the model's.
        """
        if spec is not None and options.get("size") not in (None, spec.size):
            raise UserError(
                f"--data.image_size is {options['size']}, but the model takes images of {spec.size} pixels: "
                "leave it out (LinearHeadTask takes another size by --model.img_size)"
            )
        own = cls() if spec is None else cls(spec.size, spec.mean, spec.std, spec.interpolation, spec.resize)
        return replace(own, **{name: value for name, value in options.items() if value is not None})
