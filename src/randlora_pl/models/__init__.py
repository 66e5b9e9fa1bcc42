"""CLIP models of open_clip and vision models of timm.

Names are imported at first use: both libraries take seconds, and the catalog must not wait for them.

Examples:
    >>> from randlora_pl.models import MODELS, ImageTower, encode_prompts, library_of, load_clip, load_vit, meta_clip
    >>> clip = load_clip("tiny")  # load_clip("ViT-B-32", "openai") loads OpenAI's weights
    >>> encode_prompts(clip.model, clip.tokenizer, ["cat", "dog"], ["a photo of a {}."], "cpu").shape
    torch.Size([2, 128])
    >>> pixels = torch.zeros(1, 3, clip.image.size, clip.image.size)
    >>> features = ImageTower(clip.model)(pixels)
    >>> vit = load_vit("vit_tiny_patch16_224")  # with random weights; "timm" as second argument: timm's
    >>> vit.num_features, vit.identity.library
    (192, 'timm')
    >>> sum(parameter.numel() for parameter in meta_clip("ViT-B-32").parameters())  # allocates nothing
    151277313
    >>> library_of("ViT-B-32"), MODELS[0].name
    ('open_clip', 'tiny')
"""

from typing import TYPE_CHECKING

from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.models.catalog import MODELS, ModelRow, library_of
    from randlora_pl.models.clip import ImageTower, LoadedClip, clip_image_spec, load_clip, load_tokenizer, meta_clip
    from randlora_pl.models.execution import cast_frozen, compile_blocks, use_fast_layers
    from randlora_pl.models.text import cached_text_head, class_prompts, encode_prompts
    from randlora_pl.models.vit import LoadedVit, load_vit, meta_vit, vit_image_spec
    from randlora_pl.models.weights import ImageSpec, ModelIdentity, read_weights, set_gradient_checkpointing

__getattr__, __dir__ = lazy_exports(__name__, __file__)
