"""Which rows of a fused weight are q, k and v."""

from torch import nn

from randlora_pl.adapters.weights import weight_of

BLOCKS = ("q", "k", "v")


def row_blocks(model: nn.Module, path: str) -> dict[str, tuple[int, int]]:
    """First and last row + 1 of q, k and v in a fused weight; empty where nothing tells them.

    They are thirds where the weight has three rows for each column. With fewer heads for k and v than for q
    (grouped-query attention, Phi-3's ``qkv_proj``), the module above says how many rows those have, as
    ``head_dim * num_key_value_heads``, the names that transformers gives them.

    Args:
        model: The model.
        path: The module in it that owns the weight: a linear layer of any kind, or ``nn.MultiheadAttention``.
    """
    module, above = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    out_features, in_features = weight_of(module, values=False).shape
    size, heads = (getattr(above, name, None) for name in ("head_dim", "num_key_value_heads"))
    few = size * heads if isinstance(size, int) and isinstance(heads, int) else 0
    if few and out_features > 2 * few:
        many = out_features - 2 * few
    elif out_features == 3 * in_features:
        many = few = in_features
    else:
        return {}
    return {"q": (0, many), "k": (many, many + few), "v": (many + few, out_features)}
