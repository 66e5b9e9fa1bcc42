"""The blocks of a transformer, with states that learned tokens replace between them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_blocks(transformer: Any, x: Tensor, deep: Sequence[Tensor], first: int, mask: Tensor | None = None) -> Tensor:
    """Return the states (n, L, d) after all blocks of an open_clip transformer.

    Args:
        transformer: The transformer, with its ``resblocks``.
        x: (n, L, d) states before the first block.
        deep: Before block i + 1, ``deep[i]`` (m, d) replaces the m states from ``first`` on; nothing is written into
            ``x``, which the backward pass may need.
        first: First replaced position; of a negative one the last m states are replaced.
        mask: Additive mask of the attention.
    """
    batch_first = getattr(transformer, "batch_first", True)
    again = transformer.grad_checkpointing and torch.is_grad_enabled()
    for number, block in enumerate(transformer.resblocks):
        if 0 < number <= len(deep):
            x = replaced(x, deep[number - 1], first)
        x = x if batch_first else x.transpose(0, 1)
        x = checkpoint(block, x, attn_mask=mask, use_reentrant=False) if again else block(x, attn_mask=mask)
        x = x if batch_first else x.transpose(0, 1)
    return x


def replaced(x: Tensor, tokens: Tensor, first: int) -> Tensor:
    """Return states (n, L, d) with tokens (m, d) from a position on, or at the end if ``first`` is negative."""
    start = x.shape[1] - len(tokens) if first < 0 else first
    own = tokens.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :start], own, x[:, start + len(tokens) :]], dim=1)
