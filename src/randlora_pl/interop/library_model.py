"""Models built and loaded by open_clip and timm alone, without this project's code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import timm
from open_clip import CLIP
from open_clip.transform import PreprocessCfg
from timm.models import get_pretrained_cfg
from torch import nn

from randlora_pl.models import ImageSpec, clip_image_spec, vit_image_spec
from randlora_pl.models.clip import image_size, resolve
from randlora_pl.models.folder import is_folder, open_folder
from randlora_pl.models.weights import quiet
from randlora_pl.utils.weights_files import local_name


@dataclass(frozen=True)
class LibraryModel:
    """Recipe of a model built by its library, ``open_clip`` or ``timm``, under its name there.

    ``options`` are further arguments of ``create_model``, ``config`` describes a model that open_clip does
    not have, and ``classifier`` is timm's classification layer; empty if there is not exactly one.
    """

    library: str
    name: str
    image: ImageSpec
    options: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    classifier: str = ""

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> "LibraryModel":
        """Return the recipe for an identity (`ModelIdentity.as_dict`); for timm without a classifier."""
        size = identity.get("image_size")
        name = local_name(identity, "the adapter")
        if identity["library"] == "open_clip":
            tag = "random" if identity.get("sha256") else identity["pretrained"]  # a file has no further options
            source = resolve(name, tag)
            options = {} if size in (None, image_size(source)) else {"force_image_size": size}
            image = clip_image_spec(name, tag, size)
            own = source.config if source.folder is not None or name == "tiny" else None
            return cls("open_clip", source.library_name, image, options, own)
        image, options = vit_image_spec(name, size), {}
        if is_folder(name):
            config, name, options = open_folder(name, "timm").timm_parts()
        else:
            config = get_pretrained_cfg(name)
        options = options | {"num_classes": 0}
        if config.fixed_input_size and image.size != config.input_size[-1]:
            options["img_size"] = image.size
        classifier = config.classifier if isinstance(config.classifier, str) else ""
        return cls("timm", name, image, options, None, classifier)

    def load(self, path: Path) -> nn.Module:
        """Build the model and load every tensor of a file strictly, with the library's own functions."""
        with quiet():
            if self.library == "timm":
                model: nn.Module = timm.create_model(self.name, checkpoint_path=str(path), **self.options)
            elif self.config is None:
                model = open_clip.create_model(self.name, pretrained=str(path), **self.options)
            else:
                if self.name == "tiny":
                    model = CLIP(**self.config)
                else:
                    model = open_clip.create_model(self.name, load_weights=False, pretrained_text=False, **self.options)
                open_clip.load_checkpoint(model, str(path))
        return model.eval()

    def lines(self, path: Path) -> list[str]:
        """Return Python code that does the same; the model stores its image format (``visual.preprocess_cfg``)."""
        options = dict(self.options)
        if self.library == "open_clip":  # it would take its defaults for a weights file, not the tag's values
            image, usual = self.image, PreprocessCfg()
            shown: dict[str, Any] = {"mean": image.mean, "std": image.std, "interpolation": image.interpolation}
            if image.crop_pct == 1:  # else the mode alone would be another preprocessing
                shown |= {"resize_mode": image.resize}
            if image.crop_pct == 1 and image.resize == "longest":
                shown["fill_color"] = image.fill[0] if len(set(image.fill)) == 1 else image.fill
            if any(getattr(usual, name) != value for name, value in shown.items()):
                options["force_preprocess_cfg"] = shown
        more = "".join(f", {name}={value!r}" for name, value in options.items())
        if self.library == "timm":
            return ["import timm", f"model = timm.create_model({self.name!r}, checkpoint_path={str(path)!r}{more})"]
        name = self.name if self.config is None else config_file(path).stem
        add = [] if self.config is None else [f"open_clip.add_model_config({str(config_file(path))!r})"]
        create = f"model = open_clip.create_model({name!r}, pretrained={str(path)!r}{more})"
        return ["import open_clip", *add, create]

    def transform(self) -> list[str]:
        """Return Python code, after `lines`, that defines ``preprocess`` of a picture by the library's own transform.

        It is empty if the library has none: open_clip knows no crop_pct.
        """
        image = self.image
        if self.library == "timm":
            modes = {"shortest": "center", "longest": "border", "squash": "squash"}
            if image.resize == "longest" and image.fill != image.filled_with_mean().fill:
                return []
            options: dict[str, Any] = {"interpolation": image.interpolation, "mean": image.mean, "std": image.std}
            options |= {"crop_pct": image.crop_pct, "crop_mode": modes[image.resize]}
            typed = ", ".join(f"{name}={value!r}" for name, value in options.items())
            made = [f"transform = timm.data.create_transform({image.size}, {typed})"]
        elif image.crop_pct != 1:
            return []
        else:
            made = [
                "config = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)",
                "transform = open_clip.transform.image_transform_v2(config, is_train=False)",
            ]
        return [
            *made,  # no library's transform lays transparent pictures on the background
            "from PIL import Image",
            "def preprocess(picture):",
            "    if picture.has_transparency_data:",
            "        over = picture.convert('RGBA')",
            f"        picture = Image.alpha_composite(Image.new('RGBA', over.size, {(*image.behind, 255)}), over)",
            "    return transform(picture.convert('RGB'))",
        ]

    def config_text(self) -> str:
        """Return the JSON configuration for ``open_clip.add_model_config``; only if open_clip has none."""
        return json.dumps(self.config, indent=2) + "\n"


def config_file(path: Path) -> Path:
    """Return the path of a weights file's configuration; its stem is the model's name."""
    return path.with_suffix(".json")
