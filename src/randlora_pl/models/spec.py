"""Image preprocessing and identity of a model. Imports nothing heavy."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ImageSpec:
    """Image preprocessing of a model.

    As in the paper, the shorter side is resized and the center is cropped. Other resize modes (``squash`` of the SigLIP
    and some DFN weights) and timm's ``crop_pct`` are ignored. Training may pad instead.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel (red, green, blue) of images on [0, 1].
        std: Standard deviation of each channel of images on [0, 1].
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize: ``"crop"``, or ``"pad"``: the whole image on a square of the mean color.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize: str = "crop"

    def summary(self) -> str:
        """Return a one-line description."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        padded = ", padded with the mean color" if self.resize == "pad" else ""
        return f"{self.size} pixels{padded}, {self.interpolation}, mean {mean}, std {std}"


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of a base model, sufficient to build it again and to reject adapters of other models.

    Attributes:
        library: ``"open_clip"``, ``"timm"`` or ``"transformers"``.
        name: Architecture, after correction (for instance ``ViT-B-32-quickgelu``).
        pretrained: A tag, the name of a file, or ``"random"``.
        image_size: Height and width in pixels that the model was built for; only for image models.
        seed: Seed of the initialization; only for random weights.
        sha256: SHA-256 of the weights file, by which `weights_files` finds it; only for a file.
    """

    library: str
    name: str
    pretrained: str
    image_size: int | None = None
    seed: int | None = None
    sha256: str | None = None

    def as_dict(self) -> dict[str, str | int]:
        """Return the fields that are not None, as JSON values."""
        return {key: value for key, value in asdict(self).items() if value is not None}
