"""Image features of an unchanged vision transformer, with learned tokens after its patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.models.prompted.blocks import copies, run_blocks
from randlora_pl.utils.errors import UserError


def image_blocks(visual: Any) -> list[nn.Module]:
    """Return the blocks of an image tower that learned tokens can pass through.

    Raises:
        UserError: The tower has rotary positions, or is not a vision transformer of open_clip or timm.
    """
    trunk: Any = getattr(visual, "trunk", None)
    if trunk is None and hasattr(visual, "_embeds") and hasattr(visual, "transformer"):
        return list(visual.transformer.resblocks)
    if type(trunk).__name__ == "VisionTransformer" and getattr(trunk, "rope", None) is None:
        return list(trunk.blocks)
    name = type(visual if trunk is None else trunk).__name__
    raise UserError(
        f"visual prompts need a vision transformer, such as ViT-B-32's; the image tower is {name}. Prompts of the text "
        "tower work (--model.prompts CoOp, or vision_length 0)."
    )


def image_width(visual: Any) -> int:
    """Return the width of the image tower's states, in which its learned tokens are."""
    image_blocks(visual)
    trunk = getattr(visual, "trunk", None)
    return int(visual.conv1.out_channels if trunk is None else trunk.embed_dim)


def image_features(visual: Any, images: Tensor, prompts: Sequence[Tensor] = ()) -> Tensor:
    """Return the features (B, e) of images, not normalized.

    Args:
        visual: The image tower of a CLIP model.
        images: (B, 3, H, W).
        prompts: ``prompts[0]`` (n, d) follows the patches, after their positions; ``prompts[i]`` replaces it before
            block i. The last ones stay to the end of the tower, and are cut before the pooling.
    """
    if not prompts:
        output = visual(images)
        plain: Tensor = output[0] if isinstance(output, tuple) else output  # CoCa also returns its tokens
        return plain
    if hasattr(visual, "trunk"):
        return _of_timm(visual, images, prompts)
    x = visual._embeds(images)
    x = torch.cat([x, copies(visual.ln_pre(prompts[0]), x)], dim=1)
    tower = visual.transformer
    again, ordered = tower.grad_checkpointing, getattr(tower, "batch_first", True)
    x = run_blocks(tower.resblocks, x, prompts[1:], -1, recompute=again, batch_first=ordered)
    pooled, _ = visual._pool(x[:, : x.shape[1] - len(prompts[0])])
    features: Tensor = pooled if visual.proj is None else pooled @ visual.proj
    return features


def _of_timm(visual: Any, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    trunk = visual.trunk
    x = trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images)))
    x = trunk.norm_pre(torch.cat([x, copies(prompts[0], x)], dim=1))
    x = run_blocks(trunk.blocks, x, prompts[1:], -1, recompute=trunk.grad_checkpointing)
    x = trunk.forward_head(trunk.norm(x[:, : x.shape[1] - len(prompts[0])]))
    features: Tensor = visual.head(x)
    return features


class PromptedTower(nn.Module):
    """Module from normalized images to the features of an image tower with learned tokens, which are constants."""

    def __init__(self, visual: nn.Module, tokens: Sequence[Tensor]) -> None:
        super().__init__()
        self.visual, self.count = visual, len(tokens)
        for number, each in enumerate(tokens):
            self.register_buffer(f"tokens{number}", each.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Map (n, 3, H, W) to (n, features)."""
        return image_features(self.visual, images, [getattr(self, f"tokens{number}") for number in range(self.count)])
