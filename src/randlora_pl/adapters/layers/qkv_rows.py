"""Which rows of a fused weight are q, k and v."""

from torch import nn

from randlora_pl.adapters.layers.weight_access import weight_of

BLOCKS = ("q", "k", "v")


def row_blocks(model: nn.Module, path: str) -> dict[str, tuple[int, int]]:
    """First and last row + 1 of q, k and v in a fused weight; empty where nothing tells them.

    They are thirds where the weight has three rows for each column. With fewer heads for k and v than for q
    (grouped-query attention, Phi-3's ``qkv_proj``; one head of GPTBigCode's), the module above says how many rows those
    have, as ``head_dim * num_key_value_heads``, the names that transformers gives them. Weights whose rows go head by
    head, q, k and v of one after the other, have no such blocks.

    Args:
        model: The model.
        path: The module in it that owns the weight: a linear layer of any kind, or ``nn.MultiheadAttention``.
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
    """Whether an attention module of transformers cuts its fused weight into heads, or groups of them, first.

    Both have three rows for each column, as those that hold q, k and v one after the other; their names tell.
    """
    name = type(attention).__name__
    return name == "CodeGenAttention" or (name == "GPTBigCodeAttention" and not attention.multi_query)
