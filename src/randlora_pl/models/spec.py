"""What a model expects of an image, and which model it is. Imports nothing heavy."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ImageSpec:
    """How an image must be prepared for a model.

    The protocol of the paper resizes the shorter side and crops the centre; libraries' other resize
    modes (``squash`` of the SigLIP and some DFN weights) and timm's ``crop_pct`` are not followed.
    Training may pad instead.

    Attributes:
        size: Height and width in pixels.
        mean: Mean of each channel (red, green, blue) of images on [0, 1].
        std: Standard deviation of each channel of images on [0, 1].
        interpolation: ``"bicubic"`` or ``"bilinear"``.
        resize: ``"crop"``, or ``"pad"``: the whole image on a square of the mean colour.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    resize: str = "crop"

    def summary(self) -> str:
        """All of it on part of a line."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        padded = ", padded with the mean colour" if self.resize == "pad" else ""
        return f"{self.size} pixels{padded}, {self.interpolation}, mean {mean}, std {std}"


@dataclass(frozen=True)
class ModelIdentity:
    """Which base model it is: enough to build it again and to refuse an adapter of another one.

    Attributes:
        library: ``"open_clip"``, ``"timm"`` or ``"transformers"``.
        name: Architecture, after correction (for instance ``ViT-B-32-quickgelu``).
        pretrained: A tag, the name of a file, or ``"random"``.
        image_size: Height and width in pixels that the model was built for; only for images.
        seed: Seed of the initialisation; only for random weights.
        sha256: SHA-256 of the weights file; only for a file; finds it (`weights_files`).
    """

    library: str
    name: str
    pretrained: str
    image_size: int | None = None
    seed: int | None = None
    sha256: str | None = None

    def as_dict(self) -> dict[str, str | int]:
        """The known fields, ready for JSON."""
        return {key: value for key, value in asdict(self).items() if value is not None}
