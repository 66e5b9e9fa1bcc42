"""Weights of a model that can be adapted: names, shapes, and roles in a block."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from randlora_pl.adapters.layers.weight_access import is_conv1d, out_and_in, row_blocks
from randlora_pl.adapters.weights import WeightShape, matches

# Attribute names of a block's weights in open_clip, timm, torchvision, PyTorch and transformers; the first match is
# used.
_ATTENTION = r"(?:\w*attn\w*|\w*[Aa]ttention\w*|xca|token_mixer|factoratt\w*)"
_ROLES = {
    "qkv": r"in_proj|qkv|qkv_proj|Wqkv|c_attn",
    "q": r"q|q_proj|q_lin|query|query_proj|to_q|wq",
    "k": r"k|k_proj|k_lin|key|key_proj|to_k|wk",
    "v": r"v|v_proj|v_lin|value|value_proj|to_v|wv",
    "kv": r"kv|kv_proj|to_kv",
    "qk": r"qk",
    "o": rf"{_ATTENTION}\.(?:out_proj|out_lin|proj|o_proj|o|c_proj|output\.dense)",
    "fc1": r"c_fc|fc1|linear1|lin1|intermediate\.dense|up_proj|gate_up_proj|mlp\.0|wi|wi_0|wi_1",
    "fc2": r"mlp\.c_proj|fc2|linear2|lin2|output\.dense|down_proj|mlp\.3|(?:DenseReluDense|mlp|expert_\d+)\.wo",
    "gate": r"gate_proj",
}
_ASIDE = r"(?:meta_mlp|\w*rel_pos\w*)\..+|routing_fn"
"""Small networks that compute attention biases from coordinates, with the layer names of a block's MLP, or that mix
the kernels of a convolution (CondConv)."""
CONV = "conv"
"""Kind of convolution sites, and the alias of all convolutions in blocks."""

ALIASES: dict[str, tuple[str, ...]] = {
    "qkv": ("qkv", "q", "k", "v", "kv", "qk"),
    "attn": ("qkv", "q", "k", "v", "kv", "qk", "o"),
    "mlp": ("fc1", "fc2"),
    "all": tuple(_ROLES),
    CONV: (),
} | {role: (role,) for role in ("q", "k", "v", "kv", "o", "fc1", "fc2", "gate")}
"""Roles of each alias; ``all`` and ``conv`` also select layers of the blocks without a role. The role ``qk`` (packed
in ConViT) needs no alias, because its layers have that name."""


@dataclass(frozen=True)
class Site:
    """Weight, or row block of a weight, that can be adapted.

    Attributes:
        shape: Name and shape of the update.
        path: Path of the module with the weight.
        kind: ``linear``, ``conv``, or ``q``, ``k``, ``v`` or ``qkv`` of a packed weight.
        role: Role in a block (``qkv q k v kv qk o fc1 fc2 gate``), "" if unknown.
        block: Name of the row block, None for a full weight.
        rows: First row and last row + 1 of the block.
        transposed: True if the module stores its weight as (in, out).
    """

    shape: WeightShape
    path: str
    kind: str
    role: str = ""
    block: str | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


def find_sites(model: nn.Module) -> list[Site]:
    """Return every weight that can be adapted: linear, convolution and attention weights, packed and block by block.

    A convolution's weight (out, in / groups, height, width) is a matrix (out, in / groups * height * width).
    """
    found: list[Site] = []
    for path, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            if module.in_proj_weight is not None:
                name, columns = f"{path}.in_proj".lstrip("."), module.in_proj_weight.shape[1]
                found += _packed(path, name, columns, row_blocks(model, path), False)
        elif shape := out_and_in(module):
            own, transposed = not is_aside(path), is_conv1d(module)
            role = next((role for role, names in _ROLES.items() if own and matches(names, path)), "")
            if isinstance(module, nn.Conv2d):
                found.append(Site(WeightShape(path, *shape), path, CONV))
            elif is_packed_linear(path) and (blocks := row_blocks(model, path)):
                found += _packed(path, path, shape[1], blocks, transposed)
            else:
                found.append(Site(WeightShape(path, *shape), path, "linear", role, transposed=transposed))
    return found


def is_packed_linear(path: str) -> bool:
    """Return True if the name is a linear layer for q, k and v together."""
    return matches(_ROLES["qkv"], path)


def is_aside(path: str) -> bool:
    """Return True if a layer belongs to a small auxiliary network, which has no role and is not in the default."""
    return matches(_ASIDE, path)


def _packed(path: str, name: str, columns: int, blocks: dict[str, tuple[int, int]], transposed: bool) -> Iterator[Site]:
    yield Site(WeightShape(name, blocks["v"][1], columns), path, "qkv", "qkv", transposed=transposed)
    for block, rows in blocks.items():
        shape = WeightShape(f"{path}.{block}".lstrip("."), rows[1] - rows[0], columns)
        yield Site(shape, path, block, block, block, rows, transposed)
