"""Resolution of CLIP names and tags, with activation and image preprocessing, without loading weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from randlora_pl.models.folders.model_folder import OWN, ModelFolder, is_folder, open_folder
from randlora_pl.models.init_context import check_size, quiet
from randlora_pl.models.spec import ImageSpec, open_clip_spec
from randlora_pl.models.tiny import TINY_CONFIG, TINY_TAG
from randlora_pl.models.weights import not_downloaded
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.hub_files import asking_hub
from randlora_pl.utils.files.weights_files import looks_like_file

_QUICK = "-quickgelu"
PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""Keys of open_clip's image preprocessing."""


@dataclass(frozen=True)
class Source:
    """Resolved model name and weights, checked as far as possible without the weights.

    Attributes:
        name: Architecture, after correction, or name of a folder or repository (`ModelFolder.name`).
        pretrained: Tag, absolute path, ``own`` or ``random``.
        kind: ``tag`` (to download), ``file``, ``own`` (beside the configuration), ``shipped`` (in this package) or
            ``random``.
        config: open_clip's configuration of the architecture.
        preprocess: open_clip's image preprocessing of the weights (`PREPROCESS`); for a tag the complete entry,
            with the location of the weights.
        notes: Messages for the user about the choice.
        folder: Folder or repository with the configuration, if open_clip does not have it.
    """

    name: str
    pretrained: str
    kind: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    notes: tuple[str, ...] = ()
    folder: ModelFolder | None = None

    @property
    def library_name(self) -> str:
        """Name by which open_clip builds the model on this machine."""
        return self.name if self.folder is None else self.folder.local_name

    @property
    def stored(self) -> tuple[str, str | None]:
        """Name for adapter files, and SHA-256 of the configuration file if open_clip does not have it."""
        return (self.name, None) if self.folder is None else (self.folder.stored_name, self.folder.sha256)

    @property
    def what(self) -> str:
        """Description of weights and model, for messages."""
        return f"weights '{self.pretrained}' for {self.name}"

    @property
    def timm_tower(self) -> bool:
        """True if timm provides the image tower."""
        return bool(self.config["vision_cfg"].get("timm_model_name"))


def resolve(name: str, pretrained: str | None) -> Source:
    """Check a name and its weights, and choose the name with the activation of the weights.

    Args:
        name: A name of ``open_clip.list_models()`` (``ViT-B/32`` is read as ``ViT-B-32``), ``tiny``,
            ``local-dir:PATH`` or ``hf-hub:ORG/NAME``.
        pretrained: Tag, file, ``random``, or None for the default (``tiny``: its bundled weights; a folder or
            repository: its own, also ``own``; else ``random``).

    Raises:
        UserError: Unknown name or tag.
    """
    if is_folder(name):
        return _in_folder(open_folder(name, "open_clip"), pretrained)
    names = ["tiny", *open_clip.list_models()]
    name = name if name in names else name.replace("/", "-")
    if name not in names:
        raise UserError(
            f"--model.name: no CLIP model '{name}'.{near(name, names)} Known are 'tiny' and open_clip's architectures "
            "(`randlora-pl models` shows some); weights of your own go to --model.pretrained PATH."
        )
    tiny = name == "tiny"
    config = TINY_CONFIG["model_cfg"] if tiny else _config(name)
    preprocess = TINY_CONFIG["preprocess_cfg"] if tiny else _usual_preprocess(name)
    if tiny and pretrained in (None, TINY_TAG):
        return Source("tiny", TINY_TAG, "shipped", config, preprocess)
    if pretrained in (None, "random"):
        return Source(name, "random", "random", config, preprocess)
    assert pretrained is not None
    tag = pretrained.lower().replace("-", "_")
    twin, found = (name, {}) if tiny else _match_activation(name, tag, names)
    if found:
        activation = "QuickGELU" if twin.endswith(_QUICK) else "plain GELU"
        note = f"{name}: the weights '{tag}' were trained with {activation}, so {twin} is used."
        return Source(twin, tag, "tag", _config(twin), found, (note,) if twin != name else ())
    if not looks_like_file(pretrained):
        tags = [TINY_TAG] if tiny else list_pretrained_tags_by_model(name)
        raise UserError(
            f"--model.pretrained: {name} has no weights '{pretrained}'.{near(pretrained, tags)} "
            f"Its tags: {', '.join(tags) or 'none'}; a file or 'random' also work."
        )
    path = str(Path(pretrained).expanduser().absolute())
    return Source(name, path, "file", config, preprocess, () if tiny else _file_notes(name, names))


def _in_folder(folder: ModelFolder, pretrained: str | None) -> Source:
    """Return the source of a model in a folder or repository, with its own preprocessing."""
    if folder.revision is not None:
        raise UserError(f"--model.name: {folder.name} has a revision, which open_clip does not take. Remove it.")
    config = folder.config["model_cfg"]
    preprocess = merge_preprocess_dict(PreprocessCfg(), folder.config.get("preprocess_cfg", {}))
    if pretrained in (None, OWN, "random"):
        kind = pretrained or OWN
        return Source(folder.name, kind, kind, config, preprocess, folder=folder)
    assert pretrained is not None
    return Source(folder.name, folder.file_of(pretrained), "file", config, preprocess, folder=folder)


def _match_activation(name: str, tag: str, names: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the name with the activation of the tag's weights, and open_clip's entry of the tag."""
    found = get_pretrained_cfg(name, tag)
    plain = name.removesuffix(_QUICK)
    if found.get("quick_gelu") and not _config(name).get("quick_gelu") and name + _QUICK in names:
        return name + _QUICK, dict(found)
    if not found and plain != name:
        return plain, dict(get_pretrained_cfg(plain, tag))
    return name, dict(found)


def _file_notes(name: str, names: list[str]) -> tuple[str, ...]:
    """Return notes on the activation and the image preprocessing that are assumed for a weights file."""
    notes = []
    plain = name.removesuffix(_QUICK)
    if plain + _QUICK in names:
        used, other = ("QuickGELU", plain) if plain != name else ("plain GELU", name + _QUICK)
        notes.append(f"{name}: the file is used with {used}; weights trained otherwise need --model.name {other}.")
    if len(_preprocess_variants(name)) > 1:
        notes.append(f"{name}: known weights differ in image preprocessing; OpenAI's is used for the file.")
    return tuple(notes)


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def _preprocess_variants(name: str) -> list[dict[str, Any]]:
    entries = [get_pretrained_cfg(name, tag) for tag in list_pretrained_tags_by_model(name)]
    variants = [{key: entry[key] for key in PREPROCESS if key in entry} for entry in entries]
    return [variant for number, variant in enumerate(variants) if variant not in variants[:number]]


def _usual_preprocess(name: str) -> dict[str, Any]:
    """Return the preprocessing that all known weights of an architecture share, else open_clip's default (OpenAI's)."""
    variants = _preprocess_variants(name)
    return variants[0] if len(variants) == 1 else {}


def image_size(source: Source) -> int:
    """Return the height and width of an architecture's images in pixels.

    Raises:
        UserError: The images are not square.
    """
    size = source.config["vision_cfg"].get("image_size", 224)
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) > 1:
        raise UserError(f"{source.name} needs images of {size} pixels; only square images are supported.")
    return int(sides.pop())


def image_spec(source: Source, force_image_size: int | None = None) -> ImageSpec:
    """Return the image preprocessing of a model with its weights.

    Args:
        source: Result of `resolve`.
        force_image_size: Height and width in pixels, if not the model's own.

    Raises:
        UserError: The size is not a multiple of the patch size, or the model has a fixed size.
    """
    usual = image_size(source)
    size = usual if force_image_size is None else force_image_size
    vision = source.config["vision_cfg"]
    patch = vision.get("patch_size", 16) if isinstance(vision.get("layers", 12), int) and not source.timm_tower else 1
    check_size(source.name, size, patch)
    if source.name == "tiny" and size != usual:
        raise UserError(f"The tiny CLIP works at {usual} pixels only, not at {size}; leave out the image size.")
    return open_clip_spec(source.preprocess, size, source.name)


def download(source: Source) -> str:
    """Return the path of the weights of a tag, folder or repository; download them if they are missing.

    Raises:
        UserError: The weights are neither cached nor downloadable; the message has the URL and the option for a file.
    """
    if source.kind == OWN:
        assert source.folder is not None
        return str(source.folder.weights())
    try:
        with quiet(), asking_hub():
            return str(download_pretrained(source.preprocess))
    except Exception as error:  # huggingface_hub, its HTTP client and urllib raise different types
        where = source.preprocess.get("hf_hub", "").strip("/")
        url = f"https://huggingface.co/{where}" if where else source.preprocess.get("url", "")
        raise not_downloaded(source.what, error, url, f"--model.name {source.name} ") from error
