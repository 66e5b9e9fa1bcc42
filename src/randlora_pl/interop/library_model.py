"""How open_clip and timm build a model and load its weights with no code of ours, and what it then computes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg
from timm.models import get_pretrained_cfg
from torch import nn

from randlora_pl.models import ImageSpec, clip_image_spec, vit_image_spec
from randlora_pl.models.clip_source import image_size, resolve
from randlora_pl.models.init_context import quiet


@dataclass(frozen=True)
class Bare:
    """A model as its library builds it.

    Attributes:
        library: ``open_clip`` or ``timm``.
        name: The library's name of it.
        image: What it expects of an image.
        options: Further arguments of the library's ``create_model``.
        config: open_clip's configuration of a model that it has no name for, such as ``tiny``.
        classifier: Name of timm's classification layer, empty where there is no single one.
    """

    library: str
    name: str
    image: ImageSpec
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    classifier: str = ""

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> "Bare":
        """The model of an identity (`ModelIdentity.as_dict`), for timm without a classifier."""
        name, size = identity["name"], identity.get("image_size")
        if identity["library"] == "open_clip":
            tag = "random" if identity.get("sha256") else identity["pretrained"]  # a file says nothing more than none
            source = resolve(name, tag)
            options = {} if size in (None, image_size(source)) else {"force_image_size": size}
            image = clip_image_spec(name, tag, size)
            return cls("open_clip", name, image, options, source.config if name == "tiny" else None)
        config: Any = get_pretrained_cfg(name)
        options = {"num_classes": 0}
        image = vit_image_spec(name, size)
        if config.fixed_input_size and image.size != config.input_size[-1]:
            options["img_size"] = image.size
        classifier = config.classifier if isinstance(config.classifier, str) else ""
        return cls("timm", name, image, options, None, classifier)

    def load(self, path: Path) -> nn.Module:
        """Builds the model and loads every tensor of a file strictly, by the library's own functions."""
        with quiet():
            if self.library == "timm":
                model: nn.Module = timm.create_model(self.name, checkpoint_path=str(path), **self.options)
            elif self.config is None:
                model = open_clip.create_model(self.name, pretrained=str(path), **self.options)
            else:
                model = CLIP(**self.config)
                open_clip.load_checkpoint(model, str(path))
        return model.eval()

    def lines(self, path: Path) -> list[str]:
        """The same in Python, for a user; the model knows what it expects of an image (``visual.preprocess_cfg``)."""
        options = self.options | self._frame()
        more = "".join(f", {name}={value!r}" for name, value in options.items())
        if self.library == "timm":
            return ["import timm", f"model = timm.create_model({self.name!r}, checkpoint_path={str(path)!r}{more})"]
        if self.config is None:
            return [
                "import open_clip",
                f"model = open_clip.create_model({self.name!r}, pretrained={str(path)!r}{more})",
            ]
        return [
            "import open_clip",
            f"open_clip.add_model_config({str(config_file(path))!r})",
            f"model = open_clip.create_model({config_file(path).stem!r}, pretrained={str(path)!r}{more})",
        ]

    def _frame(self) -> dict[str, Any]:
        """What open_clip must be told of images: of a file it takes its defaults, whatever the tag of the base has."""
        if self.library == "timm":
            return {}
        usual = PreprocessCfg()
        told: dict[str, Any] = {name: getattr(self.image, name) for name in ("mean", "std", "interpolation")}
        if self.image.resize == "pad":  # open_clip pads with a grey only: that of the mean colour
            told |= {"resize_mode": "longest", "fill_color": round(255 * sum(self.image.mean) / 3)}
        return {"force_preprocess_cfg": told} if any(getattr(usual, n) != value for n, value in told.items()) else {}

    def config_text(self) -> str:
        """The configuration for ``open_clip.add_model_config``, JSON; only where open_clip has none."""
        return json.dumps(self.config, indent=2) + "\n"


def config_file(path: Path) -> Path:
    """Where the configuration of a weights file goes; its name without the ending is the model's name."""
    return path.with_suffix(".json")
