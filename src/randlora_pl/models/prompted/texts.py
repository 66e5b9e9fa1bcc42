"""Text features of an unchanged causal tower, whose rows may have learned tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from randlora_pl.models.prompted.blocks import run_blocks
from randlora_pl.models.prompted.rows import TextRows
from randlora_pl.utils.errors import UserError


def text_tower(model: nn.Module) -> Any:
    """Return the module with the parts of a CLIP model's text tower: the model itself, or its ``text``.

    Raises:
        UserError: The tower does not suit learned tokens (see `is_causal`).
    """
    tower: Any = _tower(model)
    if not is_causal(model):
        raise UserError(
            f"learned prompts need CLIP's causal text tower and tokenizer, such as ViT-B-32's; this {_what(tower)}. "
            "Use --model.prompts Fixed with an adapter."
        )
    return tower


def _tower(model: nn.Module) -> Any:
    return model if hasattr(model, "token_embedding") else getattr(model, "text", None)


def is_causal(model: nn.Module) -> bool:
    """Return True if no position of the text tower sees a later one, and its feature is read at CLIP's end token."""
    return not _what(_tower(model))


def _what(tower: Any) -> str:
    """Return why a text tower does not suit learned tokens, empty if it does."""
    if not hasattr(tower, "token_embedding") or not hasattr(tower, "transformer"):
        return f"one is {type(tower).__name__}"
    if getattr(tower, "attn_mask", None) is None:
        return "tower's words see later words"
    if getattr(tower, "cls_emb", None) is not None:
        return "tower ends with a class token"
    pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", ""))
    if pool != "argmax" or tower.text_projection is None:  # the token with the largest id
        return f"tower is read otherwise (pool type {pool})"
    return ""


def embed_dim(model: nn.Module) -> int:
    """Return the width e of the features of a model with a causal text tower."""
    projection: Any = text_tower(model).text_projection
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])


def token_embeddings(tower: Any, ids: Tensor, slots: Tensor, context: Tensor | None) -> Tensor:
    """Return the embeddings (C, L, d) in float32 of token rows, with learned tokens in their slots.

    Args:
        tower: See `text_tower`.
        ids: (C, L) token ids.
        slots: (C, L) numbers of learned tokens, -1 for words.
        context: (M, d) learned tokens of all texts, (C, M, d) of each text, or None if no slot is taken. The copies
            are made in float32, so that C gradients add up in float32, too.
    """
    words: Tensor = tower.token_embedding(ids).float()
    if context is None:
        return words
    taken = slots.clamp(min=0)
    if context.dim() == 2:
        learned = context[taken]
    else:
        learned = context.gather(1, taken[..., None].expand(-1, -1, context.shape[-1]))
    return torch.where((slots >= 0)[..., None], learned, words)


def text_features(tower: Any, embedded: Tensor, ends: Tensor, deep: Sequence[Tensor] = ()) -> Tensor:
    """Return the features (C, e) of texts, not normalized.

    Args:
        tower: See `text_tower`.
        embedded: (C, L, d) embeddings from `token_embeddings`; L may be less than the tower's length.
        ends: (C,) positions of the end tokens.
        deep: Before block i + 1, ``deep[i]`` (n, d) replaces the states at positions 1 to n.
    """
    length, dtype = embedded.shape[1], tower.transformer.get_cast_dtype()
    x = embedded.to(dtype) + tower.positional_embedding[:length].to(dtype)
    again, ordered = tower.transformer.grad_checkpointing, getattr(tower.transformer, "batch_first", True)
    mask = tower.attn_mask[:length, :length]
    x = run_blocks(tower.transformer.resblocks, x, deep, 1, recompute=again, batch_first=ordered, attn_mask=mask)
    x = tower.ln_final(x[torch.arange(len(x), device=x.device), ends])
    projection = tower.text_projection
    features: Tensor = projection(x) if isinstance(projection, nn.Module) else x @ projection
    return features


def encode_rows(
    tower: Any, rows: TextRows, context: Tensor | None = None, deep: Sequence[Tensor] = (), again: bool = False
) -> Tensor:
    """Return the features (C, e) of all texts, not normalized, chunk by chunk.

    If there are several chunks and gradients are needed, each chunk is computed again in the backward pass, so that the
    activations of one chunk are alive at a time.

    Args:
        tower: See `text_tower`.
        rows: C texts.
        context: See `token_embeddings`.
        deep: See `text_features`.
        again: Do so with one chunk, too.
    """
    blockwise = tower.transformer.grad_checkpointing
    again = (again or len(rows.chunks) > 1) and torch.is_grad_enabled() and not blockwise
    run: Callable[..., Tensor] = partial(checkpoint, _chunk, use_reentrant=False) if again else _chunk
    if context is not None and context.dim() == 3:
        context = context[rows.order]
    parts = []
    for start, stop, length in rows.chunks:
        ids, slots, ends = rows.ids[start:stop, :length], rows.slots[start:stop, :length], rows.ends[start:stop]
        own = context[start:stop] if context is not None and context.dim() == 3 else context
        parts.append(run(tower, ids, slots, ends, own, list(deep)))
    return torch.cat(parts)[rows.inverse]


def encode_words(model: Any, tokens: Tensor, chunk_tokens: int) -> Tensor:
    """Return the features (C, e) of token rows (C, L) by a model's own ``encode_text``, in chunks as `encode_rows`."""
    chunks = torch.split(tokens, max(1, chunk_tokens // tokens.shape[1]))
    if len(chunks) > 1 and torch.is_grad_enabled():
        return torch.cat([checkpoint(model.encode_text, chunk, use_reentrant=False) for chunk in chunks])
    return torch.cat([model.encode_text(chunk) for chunk in chunks])


def _chunk(tower: Any, ids: Tensor, slots: Tensor, ends: Tensor, context: Tensor | None, deep: list[Tensor]) -> Tensor:
    return text_features(tower, token_embeddings(tower, ids, slots, context), ends, deep)
