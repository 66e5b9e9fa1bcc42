"""CLIP models of open_clip: architecture by name; weights by tag, file or seed."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed
from torch import Tensor, nn

from randlora_pl.models.clip_source import Source, download, image_size, image_spec, resolve
from randlora_pl.models.folders.model_folder import OWN
from randlora_pl.models.init_context import check_size, patch_size, quiet, seeded
from randlora_pl.models.spec import ImageSpec, ModelIdentity
from randlora_pl.models.tiny import build_tiny, tiny_tokenizer
from randlora_pl.models.weights import changed, load_strictly, read_weights
from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.files.hub_files import asking_hub, no_code_of_others
from randlora_pl.utils.files.weights_files import remember
from randlora_pl.utils.reuse import cached, cached_copy

_log = logging.getLogger("randlora_pl")
Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class LoadedClip:
    """CLIP model with ``visual``, ``encode_image``, ``encode_text`` and ``logit_scale``, on the CPU in fp32."""

    model: nn.Module
    image: ImageSpec
    identity: ModelIdentity
    embed_dim: int
    name: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer, loaded at first use (see `load_tokenizer`)."""
        return cached("tokenizer", self.name, lambda: load_tokenizer(self.name))


class ImageTower(nn.Module):
    """Image tower of a CLIP model; parameters keep their names (``visual.transformer...``)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.visual: Any = model.visual

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (n, 3, size, size), normalized with the model's `ImageSpec`; (n, embed_dim), not normalized."""
        output = self.visual(images)
        features: Tensor = output[0] if isinstance(output, tuple) else output  # CoCa also returns its tokens
        return features

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
    drawn = seed if source.kind == "random" else None
    config = source.folder and source.folder.sha256
    file = download(source) if source.kind == OWN else source.pretrained
    key = (source.kind, source.name, file, changed(file), drawn, force_image_size, config)
    return cached_copy("clip", key, lambda: _load(source, seed, force_image_size))


def _load(source: Source, seed: int, force_image_size: int | None) -> LoadedClip:
    """Load the model for `load_clip` from its resolved source."""
    image = image_spec(source, force_image_size)
    path = download(source) if source.kind in ("tag", OWN) else source.pretrained
    state = None if source.kind in ("random", "shipped") else read_weights(path)  # fails before the slower build
    with seeded(seed):
        model = _build(source, image.size, seed)
    if state is not None:
        load_strictly(model, _fitted(state, model, source), source.what)
    if source.timm_tower and image.size != image_size(source):
        tower: Any = model.visual  # open_clip also resizes timm's towers after loading
        check_size(source.name, image.size, patch_size(tower.trunk))
        with quiet():
            tower.set_input_size(image.size)
    is_file = source.kind in ("file", OWN)
    stored, digest = (Path(path).name, remember(path)) if is_file else (source.pretrained, None)
    drawn = seed if source.kind == "random" else None
    name, config = source.stored
    identity = ModelIdentity("open_clip", name, stored, image.size, drawn, digest, config)
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
        tokenizer: Tokenizer = tiny_tokenizer()
        return tokenizer
    needed = source.config["text_cfg"].get("hf_tokenizer_name")
    try:
        with quiet(), asking_hub(), no_code_of_others() if needed or source.folder else nullcontext():
            tokenizer = open_clip.get_tokenizer(source.name)
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
        with quiet(), asking_hub(), no_code_of_others() if text or source.folder else nullcontext():
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


def _fitted(state: dict[str, Tensor], model: nn.Module, source: Source) -> dict[str, Tensor]:
    """Convert older layouts and other image sizes to the model's state dict, as open_clip's own loading does."""
    try:
        state = convert_state_dict(model, state)
        if not hasattr(model, "positional_embedding"):
            state = convert_to_custom_text_state_dict(state)
        for scalar in ("logit_scale", "logit_bias"):
            target = getattr(model, scalar, None)
            if isinstance(target, Tensor) and scalar in state and state[scalar].numel() == target.numel():
                state[scalar] = state[scalar].reshape(target.shape)
        if isinstance(getattr(model, "logit_bias", None), Tensor) and "logit_scale" in state:
            state.setdefault("logit_bias", torch.zeros_like(state["logit_scale"]))
        if "text.transformer.embeddings.position_ids" not in model.state_dict():  # only before transformers 4.31
            state.pop("text.transformer.embeddings.position_ids", None)
        resize_pos_embed(state, model)
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        raise UserError(f"{source.what}: not of this architecture ({first_line(error)}).") from error
    return state
