"""Rows of q, k and v in a fused weight."""

from torch import nn

from randlora_pl.adapters.layers.weight_access import weight_of

BLOCKS = ("q", "k", "v")


def row_blocks(model: nn.Module, path: str) -> dict[str, tuple[int, int]]:
    """Return the first row and last row + 1 of q, k and v in a fused weight; empty if they are unknown.

    They are thirds if the weight has three rows per column. With fewer heads for k and v than for q (grouped-query
    attention, Phi-3's ``qkv_proj``; one head in GPTBigCode), k and v have ``head_dim * num_key_value_heads`` rows each,
    attributes of the parent module in transformers. Weights with interleaved heads (q, k and v of one head after the
    other) have no such blocks.

    Args:
        model: Model that contains the module.
        path: Path of the module with the weight: a linear layer of any kind, or ``nn.MultiheadAttention``.
    """
    module, above = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    out_features, in_features = weight_of(module, values=False).shape
    if _head_by_head(above):
        return {}
    size, heads = getattr(above, "head_dim", None), getattr(above, "num_key_value_heads", None)
    heads = getattr(above, "kv_heads", None) if heads is None else heads
    few = size * heads if isinstance(size, int) and isinstance(heads, int) else 0
    if few and out_features > 2 * few:
        many = out_features - 2 * few
    elif out_features == 3 * in_features:
        many = few = in_features
    else:
        return {}
    return {"q": (0, many), "k": (many, many + few), "v": (many + few, out_features)}


def _head_by_head(attention: nn.Module) -> bool:
    """Return True if an attention module of transformers splits its fused weight by heads, or groups of heads, first.

    Such weights also have three rows per column, so that only the class name distinguishes them.
    """
    name = type(attention).__name__
    return name == "CodeGenAttention" or (name == "GPTBigCodeAttention" and not attention.multi_query)
