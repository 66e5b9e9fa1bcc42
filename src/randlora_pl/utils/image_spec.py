"""Preprocessing of images for a model. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageSpec:
    """Image preprocessing; the default is CLIP's.

    Other resize modes (``squash`` of the SigLIP and some DFN weights) and timm's ``crop_pct`` are ignored, as in the
    paper.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel (red, green, blue) of images in [0, 1].
        std: Standard deviation of each channel of images in [0, 1].
        interpolation: ``bicubic`` or ``bilinear``.
        resize: ``crop`` resizes the shorter side and crops the center. ``pad`` resizes the longer side and fills the
            rest of the square with the mean color.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize: str = "crop"

    def summary(self) -> str:
        """Return a one-line description."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        padded = ", padded with the mean color" if self.resize == "pad" else ""
        return f"{self.size} pixels{padded}, {self.interpolation}, mean {mean}, std {std}"
