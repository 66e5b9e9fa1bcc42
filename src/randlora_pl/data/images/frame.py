"""How images are prepared for a model: size, colours, and how they become square."""

from dataclasses import dataclass
from typing import Protocol

INTERPOLATIONS = ("bicubic", "bilinear")
RESIZES = ("crop", "pad")


class ImageSpecLike(Protocol):
    """What a model says about its images (`randlora_pl.models.spec.ImageSpec`)."""

    @property
    def size(self) -> int:
        """Height and width in pixels."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel on [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of each channel on [0, 1]."""

    @property
    def interpolation(self) -> str:
        """``bicubic`` or ``bilinear``."""

    @property
    def resize(self) -> str:
        """``crop`` or ``pad``."""


@dataclass(frozen=True)
class Frame:
    """How images are prepared; the default is CLIP's.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel on [0, 1].
        std: Standard deviation of each channel on [0, 1].
        interpolation: ``bicubic`` or ``bilinear``.
        resize: ``crop``: the shorter side is resized, the centre cropped. ``pad``: the longer side is resized, and the
            rest of the square has the mean colour.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize: str = "crop"

    @classmethod
    def of(cls, spec: ImageSpecLike) -> "Frame":
        """The frame that a model asks for."""
        return cls(spec.size, spec.mean, spec.std, spec.interpolation, spec.resize)
