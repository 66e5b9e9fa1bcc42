"""CLIP models of open_clip and vision models of timm.

Names are imported at first use: both libraries take seconds, and the catalog must not wait for them.
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.models.catalog import MODELS, ModelRow
    from randlora_pl.models.clip import ImageTower, LoadedClip, clip_image_spec, load_clip, load_tokenizer, meta_clip
    from randlora_pl.models.execution import cast_frozen, compile_blocks
    from randlora_pl.models.init_context import set_gradient_checkpointing
    from randlora_pl.models.library import library_of
    from randlora_pl.models.spec import ImageSpec, ModelIdentity
    from randlora_pl.models.text import cached_text_head, class_prompts, encode_prompts
    from randlora_pl.models.vit import LoadedVit, load_vit, meta_vit, vit_image_spec
    from randlora_pl.models.weights import read_weights

__all__ = [
    "MODELS",
    "ImageSpec",
    "ImageTower",
    "LoadedClip",
    "LoadedVit",
    "ModelIdentity",
    "ModelRow",
    "cached_text_head",
    "cast_frozen",
    "class_prompts",
    "clip_image_spec",
    "compile_blocks",
    "encode_prompts",
    "library_of",
    "load_clip",
    "load_tokenizer",
    "load_vit",
    "meta_clip",
    "meta_vit",
    "read_weights",
    "set_gradient_checkpointing",
    "vit_image_spec",
]

__getattr__, __dir__ = lazy_exports(__name__, __file__)
