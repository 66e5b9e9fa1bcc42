"""CLIP models of open_clip: architecture by name, with activation and preprocessing; weights by tag, file or seed."""

import gzip
import io
import itertools
import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from randlora_pl.models import weights
from randlora_pl.models.catalog import OWN, TINY_TAG, ModelFolder, is_folder, open_folder
from randlora_pl.models.text import Tokenizer, image_features
from randlora_pl.utils.errors import UserError, first_line, near
from randlora_pl.utils.image_spec import ImageSpec
from randlora_pl.utils.reuse import cached, cached_copy
from randlora_pl.utils.weights_files import asking_hub, looks_like_file, no_code_of_others, remember

_QUICK = "-quickgelu"
PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")
"""Keys of open_clip's image preprocessing."""

_TINY = Path(__file__).with_name("tiny")
TINY_CONFIG: dict[str, Any] = json.loads((_TINY / "config.json").read_text(encoding="utf-8"))
"""`model_cfg` of the bundled tiny CLIP, and its image preprocessing `preprocess_cfg`: `size` in pixels, `mean`, `std`,
`interpolation`."""


@dataclass(frozen=True)
class Source:
    """Resolved model name and weights, checked as far as possible without the weights.

    Attributes:
        name: Architecture, after correction, or name of a folder or repository (`ModelFolder.name`).
        pretrained: Tag, absolute path, ``own`` or ``random``.
        kind: ``tag`` (to download), ``file``, ``own`` (next to the configuration), ``shipped`` (in this package) or
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
    config = TINY_CONFIG["model_cfg"] if tiny else open_clip.get_model_config(name)
    entries = (
        []
        if tiny
        else [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    )
    known = [{key: entry[key] for key in PREPROCESS if key in entry} for entry in entries]
    variants = [variant for number, variant in enumerate(known) if variant not in known[:number]]
    # the preprocessing that all known weights of an architecture share, else open_clip's default (OpenAI's)
    preprocess = TINY_CONFIG["preprocess_cfg"] if tiny else variants[0] if len(variants) == 1 else {}
    if tiny and pretrained in (None, TINY_TAG):
        return Source("tiny", TINY_TAG, "shipped", config, preprocess)
    if pretrained in (None, "random"):
        return Source(name, "random", "random", config, preprocess)
    assert pretrained is not None
    tag = pretrained.lower().replace("-", "_")
    tag_entry = {} if tiny else dict(open_clip.get_pretrained_cfg(name, tag))
    plain, twin = name.removesuffix(_QUICK), name  # the twin has the activation of the tag's weights
    if tag_entry.get("quick_gelu") and not config.get("quick_gelu") and name + _QUICK in names:
        twin = name + _QUICK
    elif not tag_entry and plain != name:
        twin, tag_entry = plain, dict(open_clip.get_pretrained_cfg(plain, tag))
    if tag_entry:
        activation = "QuickGELU" if twin.endswith(_QUICK) else "plain GELU"
        note = f"{name}: the weights '{tag}' were trained with {activation}, so {twin} is used."
        return Source(twin, tag, "tag", open_clip.get_model_config(twin), tag_entry, (note,) if twin != name else ())
    if not looks_like_file(pretrained):
        tags = [TINY_TAG] if tiny else open_clip.list_pretrained_tags_by_model(name)
        raise UserError(
            f"--model.pretrained: {name} has no weights '{pretrained}'.{near(pretrained, tags)} "
            f"Its tags: {', '.join(tags) or 'none'}; a file or 'random' also work."
        )
    notes = []
    if plain + _QUICK in names:
        used, other = ("QuickGELU", plain) if plain != name else ("plain GELU", name + _QUICK)
        notes.append(f"{name}: the file is used with {used}; weights trained otherwise need --model.name {other}.")
    if len(variants) > 1:
        notes.append(f"{name}: known weights differ in image preprocessing; OpenAI's is used for the file.")
    return Source(name, str(Path(pretrained).expanduser().absolute()), "file", config, preprocess, tuple(notes))


def _in_folder(folder: ModelFolder, pretrained: str | None) -> Source:
    if folder.revision is not None:
        raise UserError(f"--model.name: {folder.name} has a revision, which open_clip does not support. Remove it.")
    config = folder.config["model_cfg"]
    usual = open_clip.transform.PreprocessCfg()
    preprocess = open_clip.transform.merge_preprocess_dict(usual, folder.config.get("preprocess_cfg", {}))
    if pretrained in (None, OWN, "random"):
        kind = pretrained or OWN
        return Source(folder.name, kind, kind, config, preprocess, folder=folder)
    assert pretrained is not None
    return Source(folder.name, folder.file_of(pretrained), "file", config, preprocess, folder=folder)


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
    weights.check_size(source.name, size, patch)
    if source.name == "tiny" and size != usual:
        raise UserError(f"The tiny CLIP works at {usual} pixels only, not at {size}; leave out the image size.")
    return weights.open_clip_spec(source.preprocess, size, source.name)


def download(source: Source) -> str:
    """Return the path of the weights of a tag, folder or repository; download them if they are missing.

    Raises:
        UserError: The weights are neither cached nor downloadable; the message has the URL and the option for a file.
    """
    if source.kind == OWN:
        assert source.folder is not None
        return str(source.folder.weights())
    try:
        with weights.quiet(), asking_hub():
            return str(open_clip.download_pretrained(source.preprocess))
    except Exception as error:  # huggingface_hub, its HTTP client and urllib raise different types
        where = source.preprocess.get("hf_hub", "").strip("/")
        url = f"https://huggingface.co/{where}" if where else source.preprocess.get("url", "")
        raise weights.not_downloaded(source.what, error, url, f"--model.name {source.name} ") from error


_log = logging.getLogger("randlora_pl")


@dataclass
class LoadedClip:
    """CLIP model with ``visual``, ``encode_image``, ``encode_text`` and ``logit_scale``, on the CPU in fp32."""

    model: nn.Module
    image: ImageSpec
    identity: weights.ModelIdentity
    embed_dim: int
    name: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer, loaded at first use (see `load_tokenizer`)."""
        return cached("tokenizer", self.name, lambda: load_tokenizer(self.name))


class ImageTower(nn.Module):
    """Image tower of a CLIP model; parameters keep their names (``visual.transformer...``).

    Learned tokens, see `image_features`, are constants.
    """

    def __init__(self, model: nn.Module, tokens: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.visual: Any = model.visual
        self.count = len(tokens)
        for number, each in enumerate(tokens):
            self.register_buffer(f"tokens{number}", each.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, size, size), normalized with the model's `ImageSpec`; (n, embed_dim), not normalized."""
        return image_features(self.visual, images, [getattr(self, f"tokens{number}") for number in range(self.count)])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing of the tower on or off."""
        self.visual.set_grad_checkpointing(enable)


def clip_image_spec(name: str, pretrained: str | None = None, force_image_size: int | None = None) -> ImageSpec:
    """Return the image preprocessing of a CLIP model, from its configuration alone; arguments as of `load_clip`.

    Examples:
        >>> clip_image_spec("ViT-B-32", "openai").size
        224
    """
    return image_spec(resolve(name, pretrained), force_image_size)


def load_clip(
    name: str, pretrained: str | None = None, *, seed: int = 0, force_image_size: int | None = None
) -> LoadedClip:
    """Build a CLIP model on the CPU in fp32.

    OpenAI's and some other weights were trained with QuickGELU. If the activation of a name does not fit the tag, the
    name is corrected and logged (``ViT-B-32`` with ``openai`` becomes ``ViT-B-32-quickgelu``). With a file the name is
    not changed.

    Args:
        name: A name of ``open_clip.list_models()``, ``tiny``, ``local-dir:PATH`` (a folder with
            ``open_clip_config.json``) or ``hf-hub:ORG/NAME`` (a repository of the Hugging Face Hub).
        pretrained: A tag of open_clip for this architecture, a file (safetensors, or torch's format without code), or
            ``random``. None: the bundled weights of ``tiny``, a folder's or repository's own, else ``random``.
        seed: Seed of random weights, which depend on nothing else.
        force_image_size: Height and width in pixels, if not the model's own; position embeddings are resized.

    Raises:
        UserError: Unknown name or tag; a file that is missing, damaged or of another architecture; weights that cannot
            be downloaded; an image size that is not a multiple of the patch size.
    """
    source = resolve(name, pretrained)
    for note in source.notes:
        _log.warning(note)
    drawn_seed = seed if source.kind == "random" else None
    config = source.folder and source.folder.sha256
    file = download(source) if source.kind == OWN else source.pretrained
    key = (source.kind, source.name, file, weights.modification_time(file), drawn_seed, force_image_size, config)
    return cached_copy("clip", key, lambda: _load(source, seed, force_image_size))


def _load(source: Source, seed: int, force_image_size: int | None) -> LoadedClip:
    image = image_spec(source, force_image_size)
    path = download(source) if source.kind in ("tag", OWN) else source.pretrained
    without_file = source.kind in ("random", "shipped")
    state = None if without_file else weights.read_weights(path)  # fails before the slower build
    with weights.seeded(seed):
        model = _build(source, image.size, seed)
    if state is not None:
        _load_state(model, state, source)
    if source.timm_tower and image.size != image_size(source):
        tower: Any = model.visual  # open_clip also resizes timm's towers after loading
        weights.check_size(source.name, image.size, weights.patch_size(tower.trunk))
        with weights.quiet():
            tower.set_input_size(image.size)
    is_file = source.kind in ("file", OWN)
    stored, digest = (Path(path).name, remember(path)) if is_file else (source.pretrained, None)
    drawn_seed = seed if source.kind == "random" else None
    name, config = (source.name, None) if source.folder is None else (source.folder.stored_name, source.folder.sha256)
    identity = weights.ModelIdentity("open_clip", name, stored, image.size, drawn_seed, digest, config)
    return LoadedClip(model, image, identity, source.config["embed_dim"], source.name)


def meta_clip(name: str) -> nn.Module:
    """Build a CLIP model on the meta device, for parameter shapes and counts; see `load_clip`."""
    source = resolve(name, "random")
    with torch.device("meta"):
        return _build(source, image_size(source), 0, "meta")


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer of a CLIP model, from a list of n strings to an int64 tensor (n, context length).

    Raises:
        UserError: Unknown name, or files that are neither cached nor downloadable.
    """
    source = resolve(name, "random")
    if source.name == "tiny":
        return tiny_tokenizer()
    needed = source.config["text_cfg"].get("hf_tokenizer_name")
    try:
        with weights.quiet(), asking_hub(), no_code_of_others() if needed or source.folder else nullcontext():
            tokenizer: Tokenizer = open_clip.get_tokenizer(source.name)
    except Exception as error:  # OSError, ImportError or ValueError, depending on the version of transformers
        raise UserError(
            f"{source.name} needs the tokenizer '{needed or 'its own'}' of Hugging Face, which cannot be loaded "
            f"({first_line(error)}). Run once with a network (pip install transformers), or choose another model."
        ) from error
    return tokenizer


def _build(source: Source, size: int, seed: int, device: str = "cpu") -> nn.Module:
    """Build the architecture with random weights; a timm tower is resized after loading."""
    if source.name == "tiny":
        return build_tiny(source.pretrained if source.kind == "shipped" else "random", seed).to(device)
    text = source.config["text_cfg"].get("hf_model_name")
    try:
        with weights.quiet(), asking_hub(), no_code_of_others() if text or source.folder else nullcontext():
            model: nn.Module = open_clip.create_model(
                source.library_name,
                load_weights=False,
                device=device,
                force_image_size=None if source.timm_tower or size == image_size(source) else size,
                pretrained_image=False,
                pretrained_text=False,
            )
    except Exception as error:  # timm and transformers raise OSError, ImportError, RuntimeError ...
        why = f"its text tower '{text}' needs files of Hugging Face: " if text else ""
        raise UserError(f"{source.name} cannot be built ({why}{first_line(error)}). Choose another model.") from error
    return model


def build_tiny(pretrained: str = TINY_TAG, seed: int = 0) -> nn.Module:
    """Build the bundled tiny CLIP in fp32, without changing PyTorch's global generators.

    Fine-tuning it starts within seconds and without a network. `tiny/MODEL_CARD.md` documents its training data, its
    accuracy and how to pretrain it again (`scripts/pretrain_tiny_clip.py`).

    Args:
        pretrained: `"emoji-fashion"` for the bundled weights or `"random"`.
        seed: Seed of the random weights; the bundled ones do not depend on it.

    Returns:
        An `open_clip.model.CLIP` of four million parameters in training mode, as open_clip builds it. Images are
        (n, 3, 32, 32), token ids (n, 16), embeddings (n, 128).
    """
    with weights.seeded(seed):
        model: nn.Module = open_clip.CLIP(**TINY_CONFIG["model_cfg"])
    if pretrained == TINY_TAG:
        model.load_state_dict(load_file(_TINY / "model.safetensors"))  # strict; fp16 on disk, copied into fp32
    return model


@cache
def tiny_tokenizer() -> Tokenizer:
    """Build CLIP's byte-pair tokenizer with a vocabulary of the tiny model's size, once in a process.

    The ids are, in this order: 256 bytes, 256 bytes at the end of a word, the first merges of open_clip's file, the
    start and the end token. The end token has the largest id, which CLIP's text pooling looks for.

    Returns:
        An `open_clip.tokenizer.SimpleTokenizer`: a list of strings to an int64 tensor (n, 16).
    """
    text = TINY_CONFIG["model_cfg"]["text_cfg"]
    merges = text["vocab_size"] - 2 * 256 - 2
    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        lines = "".join(itertools.islice(file, merges + 1))  # the first line is the file's header
    packed = io.BytesIO(gzip.compress(lines.rstrip("\n").encode()))
    made: Tokenizer = open_clip.SimpleTokenizer(bpe_path=packed, context_length=text["context_length"])
    return made


def _load_state(model: nn.Module, state: dict[str, Tensor], source: Source) -> None:
    """Load every tensor; older layouts and other image sizes are converted, as open_clip's own loading does."""
    try:
        state = open_clip.convert.convert_state_dict(model, state)
        if not hasattr(model, "positional_embedding"):
            state = open_clip.model.convert_to_custom_text_state_dict(state)
        for scalar in ("logit_scale", "logit_bias"):
            target = getattr(model, scalar, None)
            if isinstance(target, Tensor) and scalar in state and state[scalar].numel() == target.numel():
                state[scalar] = state[scalar].reshape(target.shape)
        if isinstance(getattr(model, "logit_bias", None), Tensor) and "logit_scale" in state:
            state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
        state.pop("text.transformer.embeddings.position_ids", None)  # no tensor since transformers 4.31
        open_clip.model.resize_pos_embed(state, model)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{source.what}: does not fit this architecture ({first_line(error)}).") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(weights.mismatch(source.what, str(error))) from error
