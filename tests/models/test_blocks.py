"""Blocks are found in every kind of backbone, with nearly all of its weights."""

from collections.abc import Callable

import pytest
from torch import nn

from randlora_pl.adapters import LoRA, inject
from randlora_pl.models import ImageTower, meta_clip, meta_vit
from randlora_pl.models.execution import repeated_blocks


@pytest.mark.parametrize(
    ("model", "first", "count", "share"),
    [
        (lambda: meta_clip("tiny"), "visual.transformer.resblocks.0", 10, 0.8),
        (lambda: ImageTower(meta_clip("tiny")), "visual.transformer.resblocks.0", 6, 0.9),
        (lambda: meta_clip("ViT-B-16-SigLIP"), "visual.trunk.blocks.0", 24, 0.8),
        (lambda: meta_vit("vit_tiny_patch16_224"), "blocks.0", 12, 0.9),
        (lambda: meta_vit("swin_tiny_patch4_window7_224"), "layers.0.blocks.0", 12, 0.9),
    ],
)
def test_blocks_hold_nearly_all_weights(model: Callable[[], nn.Module], first: str, count: int, share: float) -> None:
    built = model()
    blocks = repeated_blocks(built)
    assert (next(iter(blocks)), len(blocks)) == (first, count)
    inside = [parameter for block in blocks.values() for parameter in block.parameters()]
    assert len(set(inside)) == len(inside)
    assert sum(p.numel() for p in inside) > share * sum(p.numel() for p in built.parameters())


def test_sequences_of_layers_are_no_blocks() -> None:
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {}
    assert repeated_blocks(nn.Sequential(nn.Sequential(nn.Linear(2, 2)))) == {}


def test_an_adapter_changes_no_blocks() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    model = nn.ModuleList([block(), block()])
    inject(model, LoRA(rank=1))
    assert list(repeated_blocks(model)) == ["0", "1"]
