"""The blocks of a transformer, with states that learned tokens replace between them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    deep: Sequence[Tensor],
    first: int,
    *,
    recompute: bool,
    batch_first: bool = True,
    **options: Any,
) -> Tensor:
    """Return the states (n, L, d) after all blocks of a transformer.

    Args:
        blocks: The blocks.
        x: (n, L, d) states before the first block.
        deep: Before block i + 1, ``deep[i]`` (m, d) replaces the m states from ``first`` on; nothing is written into
            ``x``, which the backward pass may need.
        first: First replaced position; of a negative one the last m states are replaced.
        recompute: Compute each block again in the backward pass instead of keeping its activations.
        batch_first: False if the blocks take (L, n, d).
        options: Further arguments of each block.
    """
    recompute = recompute and torch.is_grad_enabled()
    for number, block in enumerate(blocks):
        if 0 < number <= len(deep):
            x = replaced(x, deep[number - 1], first)
        x = x if batch_first else x.transpose(0, 1)
        x = checkpoint(block, x, use_reentrant=False, **options) if recompute else block(x, **options)
        x = x if batch_first else x.transpose(0, 1)
    return x


def replaced(x: Tensor, tokens: Tensor, first: int) -> Tensor:
    """Return states (n, L, d) with tokens (m, d) from a position on, or at the end if ``first`` is negative."""
    start = x.shape[1] - len(tokens) if first < 0 else first
    return torch.cat([x[:, :start], copies(tokens, x), x[:, start + len(tokens) :]], dim=1)


def copies(tokens: Tensor, x: Tensor) -> Tensor:
    """Return tokens (m, d) for each row of states (n, L, d), cast last: gradients add up in float32."""
    return tokens.expand(x.shape[0], -1, -1).to(x.dtype)  # len() would fix the batch size of an exported program
