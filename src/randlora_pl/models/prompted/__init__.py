"""Features of unchanged CLIP towers with learned tokens in the place of words, or beside the patches of an image."""

from randlora_pl.models.prompted.images import PromptedTower, image_blocks, image_features, image_width
from randlora_pl.models.prompted.rows import Position, TextRows, learned_rows, whole_rows, word_ids, word_rows
from randlora_pl.models.prompted.texts import (
    embed_dim,
    encode_rows,
    encode_words,
    is_causal,
    text_features,
    text_tower,
    token_embeddings,
)

__all__ = [
    "Position",
    "PromptedTower",
    "TextRows",
    "embed_dim",
    "encode_rows",
    "encode_words",
    "image_blocks",
    "image_features",
    "image_width",
    "is_causal",
    "learned_rows",
    "text_features",
    "text_tower",
    "token_embeddings",
    "whole_rows",
    "word_ids",
    "word_rows",
]
