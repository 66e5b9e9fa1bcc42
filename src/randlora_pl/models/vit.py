"""Vision models of timm (DINOv2, supervised ViTs, ...) without classifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from randlora_pl.models import weights
from randlora_pl.models.catalog import OWN, ModelFolder, is_folder, open_folder
from randlora_pl.utils.errors import UserError, brief, first_line, near
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.reuse import cached_copy
from randlora_pl.utils.weights_files import asking_hub, looks_like_file, remember

Named = str | ModelFolder
"""A name of timm, or the folder that a name means: opened once, so that a repository has one state."""


@dataclass
class LoadedVit:
    """Timm model without classifier, on the CPU in fp32: images (n, 3, size, size) to features (n, num_features).

    The features of DINOv2 are the normalized CLS token.
    """

    model: nn.Module
    image: ImageSpec
    identity: weights.ModelIdentity
    num_features: int


def vit_image_spec(name: str, img_size: int | None = None) -> ImageSpec:
    """Return the image preprocessing of a timm model, from its configuration alone; arguments as of `load_vit`.

    Examples:
        >>> vit_image_spec("vit_base_patch14_dinov2").size
        224
    """
    return _image_spec(_opened(name), img_size)


def _image_spec(name: Named, img_size: int | None) -> ImageSpec:
    values, (height, width) = _own_images(name)
    if img_size is None and height != width:
        raise UserError(
            f"{name} takes images of {height} x {width} pixels; only square images are supported. "
            f"Set --model.img_size {width}."
        )
    size = width if img_size is None else img_size
    weights.check_size(str(name), size, 1)
    return weights.timm_spec(values, size, str(name))


def _own_images(name: Named) -> tuple[dict[str, Any], tuple[int, int]]:
    """Return a model's preprocessing, and the height and width that it works at unless a size is typed."""
    values = resolve_data_config(pretrained_cfg=_config(name).to_dict())  # type: ignore[no-untyped-call]
    try:
        _, height, width = (int(side) for side in values["input_size"])
    except (TypeError, ValueError):
        shown = brief(values["input_size"])
        raise UserError(f"{name}: its input_size is {shown}. It must be three whole numbers.") from None
    if isinstance(name, str) and "dinov2" in name:
        height = width = 224  # as in the paper; timm's configurations have 518
    return values, (height, width)


def load_vit(name: str, pretrained: str | None = None, *, img_size: int | None = None, seed: int = 0) -> LoadedVit:
    """Build a timm model without classifier on the CPU in fp32.

    Args:
        name: A timm name, with or without a tag (``vit_base_patch14_dinov2.lvd142m``), ``local-dir:PATH`` (a folder
            with timm's ``config.json``) or ``hf-hub:ORG/NAME`` (a repository of the Hugging Face Hub).
        pretrained: ``timm`` (the weights that timm has for the name), a tag, a file (also one made at
            another image size: position embeddings are resized), or ``random`` (also None, but for a folder or
            repository its own weights).
        img_size: Height and width in pixels; None: the configuration's, but 224 for DINOv2 (the paper's).
        seed: Seed of random weights, which depend on nothing else.

    Raises:
        UserError: Unknown name or tag; a file that is missing, damaged or of another architecture; weights that cannot
            be downloaded; an image size that the model does not support.
    """
    named, pretrained, is_file = _resolve(_opened(name), pretrained)
    drawn_seed = seed if pretrained == "random" else None
    config = named.sha256 if isinstance(named, ModelFolder) else None
    key = (str(named), pretrained, weights.modification_time(pretrained), drawn_seed, img_size, config)
    return cached_copy("vit", key, lambda: _load(named, pretrained, is_file, img_size, seed))


def _load(name: Named, pretrained: str, is_file: bool, img_size: int | None, seed: int) -> LoadedVit:
    image = _image_spec(name, img_size)
    state = None
    if is_file:
        layers = _config(name).classifier or ()
        layers = (layers,) if isinstance(layers, str) else layers
        classifier = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
        state = {key: value for key, value in weights.read_weights(pretrained).items() if key not in classifier}
    with weights.seeded(seed):
        try:
            model: Any = _build(name, image.size, pretrained=pretrained != "random", state=state)
        except UserError:
            raise
        except Exception as error:
            what = f"weights '{pretrained}' for {name}"
            if is_file:
                raise UserError(weights.mismatch(what, str(error) or type(error).__name__)) from error
            if pretrained == "random":
                how = "Choose another model or image size."
                raise UserError(f"{name} cannot be built ({first_line(error)}). {how}") from error
            own = _config(name)
            url = f"https://huggingface.co/{own.hf_hub_id}" if own.hf_hub_id else own.url
            raise weights.not_downloaded(what, error, url) from error
        if img_size is not None:  # a model can be built for a size and fail to run; the meta device shows it
            with torch.device("meta"), torch.no_grad():
                skeleton: Any = _build(name, image.size).eval()
                try:
                    skeleton(torch.zeros(1, 3, image.size, image.size))
                except Exception as error:
                    raise UserError(
                        f"{name} cannot work with images of {image.size} x {image.size} pixels ({first_line(error)}). "
                        "Choose another --model.img_size."
                    ) from error
    stored, digest = (Path(pretrained).name, remember(pretrained)) if is_file else (pretrained, None)
    shown, config = (name.stored_name, name.sha256) if isinstance(name, ModelFolder) else (name, None)
    drawn_seed = seed if pretrained == "random" else None
    identity = weights.ModelIdentity("timm", shown, stored, image.size, drawn_seed, digest, config)
    return LoadedVit(model, image, identity, features_of(model))


def features_of(model: Any) -> int:
    """Return the output size of a timm model without classifier, which some heads widen."""
    return int(getattr(model, "head_hidden_size", None) or model.num_features)


def meta_vit(name: str, img_size: int | None = None) -> nn.Module:
    """Build a timm model without classifier on the meta device, for parameter shapes and counts; see `load_vit`.

    Examples:
        >>> sum(parameter.numel() for parameter in meta_vit("vit_base_patch16_224").parameters())
        85798656
    """
    with torch.device("meta"):
        named = _opened(name)
        return _build(named, _image_spec(named, img_size).size)


def _opened(name: str) -> Named:
    return open_folder(name, "timm") if is_folder(name) else name


def _resolve(name: Named, pretrained: str | None) -> tuple[Named, str, bool]:
    """Return the name with its tag; ``random``, the tag or an absolute path; and True if that is a file."""
    if isinstance(name, ModelFolder):
        if pretrained == "random":
            return name, pretrained, False
        return name, str(name.weights()) if pretrained in (None, OWN) else name.file_of(str(pretrained)), True
    config = _config(name)
    if pretrained in (None, "random"):
        return name, "random", False
    assert pretrained is not None
    base, _, typed = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if pretrained == "timm":
        if config.tag not in tags:
            raise UserError(f"timm has no weights for {name}. Pass a file with --model.pretrained PATH, or 'random'.")
        return f"{base}.{config.tag}", config.tag, False
    if pretrained in tags:
        if typed and typed != pretrained:
            raise UserError(f"--model.name has the tag '{typed}' but --model.pretrained is '{pretrained}'. Choose one.")
        return f"{base}.{pretrained}", pretrained, False
    if looks_like_file(pretrained):
        return name, str(Path(pretrained).expanduser().absolute()), True
    raise UserError(
        f"--model.pretrained: {base} has no weights '{pretrained}'.{near(pretrained, tags)} "
        f"Its tags: {', '.join(tags) or 'none'}; 'timm', a file or 'random' also work."
    )


def _config(name: Named) -> Any:
    if isinstance(name, ModelFolder):
        return name.timm_parts()[0]
    base, _, tag = name.partition(".")
    names = timm.list_models()
    if base not in names:
        raise UserError(
            f"--model.name: no timm model '{base}'.{near(base, names)} "
            "`randlora-pl models` shows some; weights of your own go to --model.pretrained PATH."
        )
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
        raise UserError(
            f"--model.name: {base} has no tag '{tag}'.{near(tag, tags)} Tags: {', '.join(tags)}."
        ) from error


def _build(name: Named, size: int, pretrained: bool = False, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Create the model; timm's own loading resizes position embeddings and converts foreign layouts."""
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0}
    if _config(name).fixed_input_size:  # others (convolutional) accept any size and lack the option
        options["img_size"] = size
    if state is not None:  # without "classifier" timm loads strictly
        options["pretrained_cfg_overlay"] = {"state_dict": dict(state), "classifier": None, "source": ""}
    place = name.local_name if isinstance(name, ModelFolder) else name
    with asking_hub():
        model: Any = timm.create_model(place, **options)
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    if (size, size) != _own_images(name)[1]:  # a model's own size may leave a margin: 384 in patches of 14
        weights.check_size(str(name), size, weights.patch_size(model))
    built: nn.Module = model
    return built
