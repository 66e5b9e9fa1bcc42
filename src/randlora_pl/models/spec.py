"""Image preprocessing and identity of a model. Imports nothing heavy."""

from dataclasses import asdict, dataclass

from randlora_pl.utils.image_spec import ImageSpec as ImageSpec


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
