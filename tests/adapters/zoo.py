"""Models that adapters must fit: small real ones, and full-size ones on the meta device for counting."""

from collections import OrderedDict
from typing import Any

import open_clip
import timm
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

VISION = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}


def small_clip(custom_text: bool = False, **vision: Any) -> Any:
    """An open_clip model of two blocks a tower; ``custom_text`` keeps the text tower under ``text.``."""
    kind = CustomTextCLIP if custom_text else CLIP
    return kind(embed_dim=24, vision_cfg=VISION | vision, text_cfg=dict(TEXT)).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16)


def captions(count: int = 2) -> Tensor:
    return torch.randint(1, 50, (count, 8))


def clip_on_meta(name: str) -> CLIP:
    """A full-size open_clip model without storage."""
    with torch.device("meta"):
        return CLIP(**open_clip.get_model_config(name))


def timm_on_meta(name: str, **options: Any) -> nn.Module:
    """A full-size timm backbone without storage."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, num_classes=0, **options)
    return model


def small_vit(**options: Any) -> nn.Module:
    """timm's vision transformer with two blocks."""
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=0, **options
    ).eval()


def mlp() -> nn.Sequential:
    """Layers whose names tell no role."""
    return nn.Sequential(
        OrderedDict(enter=nn.Linear(8, 12), act=nn.ReLU(), middle=nn.Linear(12, 12), leave=nn.Linear(12, 4))
    )


class Separate(nn.Module):
    """A block with separate q, k, v and a second tower, named as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleDict(
            {
                "attention": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")}),
                "intermediate": nn.ModuleDict({"dense": nn.Linear(8, 16)}),
            }
        )
        self.language = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "up_proj")})
