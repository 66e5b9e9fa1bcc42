"""Weights of a model that can be adapted: access as (out, in) matrices, names, roles in a block, and obstacles.

Classes of libraries that are not imported here are recognized by their properties. ``Conv1D`` of transformers (GPT-2)
is a module of exactly this class name whose weight is a matrix (in, out) and whose bias has ``out`` entries:
``y = x W + b``. A quantized layer (``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes) is a subclass of
``nn.Linear`` with its own forward, and has one of these names or an integer weight. torchao's is a plain ``nn.Linear``
whose weight is a tensor that unpacks itself.
"""

import functools
import inspect
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from randlora_pl.adapters.kernels.common import without_autocast
from randlora_pl.adapters.random_bases import WeightShape, matches
from randlora_pl.utils.packed import unpacks_itself

_QUANTIZED_CLASSES = ("Linear4bit", "Linear8bitLt")


def is_conv1d(module: nn.Module) -> bool:
    """Return True if a module is transformers' ``Conv1D``, adapted or not."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    named = getattr(module, "plain_class", type(module)).__name__ == "Conv1D"
    return named and weight is not None and bias is not None and weight.dim() == 2 and bias.shape == weight.shape[1:]


def is_quantized(module: nn.Module) -> bool:
    """Return True if a module is a linear layer with a packed weight, which only its own forward can use."""
    weight = module._parameters.get("weight")
    if not isinstance(module, nn.Linear) or weight is None:
        return False
    named = any(kind.__name__ in _QUANTIZED_CLASSES for kind in type(module).__mro__)
    own = type(module).forward is not nn.Linear.forward
    return unpacks_itself(weight) or (own and (named or not weight.is_floating_point()))


def out_and_in(module: nn.Module) -> tuple[int, int] | None:
    """Return the output and input size of a linear layer, or of a convolution at one position; otherwise None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
    if is_conv1d(module):
        in_features, out_features = module._parameters["weight"].shape  # type: ignore[union-attr]
        return out_features, in_features
    return None


def weight_of(module: nn.Module, values: bool = True) -> Tensor:
    """Return the weight of a linear, attention or convolution layer, (out, in); a view unless it is quantized.

    Args:
        module: Layer with the weight.
        values: If False, do not dequantize; return an empty tensor of the same shape and device.
    """
    if is_quantized(module):
        if values:
            return dequantize(module)
        assert isinstance(module, nn.Linear)
        return torch.empty((), device=module.weight.device).expand(module.out_features, module.in_features)
    weight: Tensor = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight.flatten(1)


@torch.no_grad()
def dequantize(module: nn.Module) -> Tensor:
    """Return the weight of a quantized layer, (out, in), in the layer's compute dtype if it has one.

    torchao's tensors unpack themselves. bitsandbytes unpacks the weights of its own classes, except layouts for a CPU's
    kernels; it is found by the class, because it is not a dependency. Of any other class these are the outputs of its
    forward for the unit vectors, which take an (in, in) matrix and ``2 in^2 out`` operations.
    """
    assert isinstance(module, nn.Linear)
    dtype = getattr(module, "compute_dtype", None) or (torch.float32 if module.bias is None else module.bias.dtype)
    kind = next((kind for kind in type(module).__mro__ if kind.__name__ in _QUANTIZED_CLASSES), nn.Linear)
    functional: Any = getattr(sys.modules.get(kind.__module__.partition(".")[0]), "functional", None)
    weight: Any = module.weight
    values: Tensor | None = weight.dequantize() if unpacks_itself(weight) else None
    if kind.__name__ == "Linear4bit" and functional is not None:
        state: Any = getattr(weight, "quant_state", None)
        if state is not None and not getattr(state, "packing_format_for_cpu", False):
            values = functional.dequantize_4bit(weight.data, state)
    elif kind.__name__ == "Linear8bitLt" and functional is not None:
        scales: Any = getattr(weight, "SCB", None)
        scales = module.state.SCB if scales is None else scales  # type: ignore[union-attr]  # the first forward moves them there
        if scales is not None and weight.dtype == torch.int8:
            values = functional.int8_vectorwise_dequant(weight.data, scales)
    return _of_unit_vectors(module, dtype) if values is None else values.to(dtype)


def _of_unit_vectors(module: nn.Linear, dtype: torch.dtype) -> Tensor:
    unit = torch.eye(module.in_features, device=module.weight.device, dtype=dtype)
    kind = getattr(module, "plain_class", type(module))
    before = dict(vars(module))
    with without_autocast(unit):
        rows: Tensor = kind.forward(module, unit)
    vars(module).update(before)  # bitsandbytes stores the dtype of the first input, which should not be this one
    return (rows if module.bias is None else rows - module.bias).T


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
    name = type(above).__name__
    if name == "CodeGenAttention" or (name == "GPTBigCodeAttention" and not above.multi_query):
        return {}  # split by heads, or groups of heads, first: also with three rows per column
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
    sites: list[Site] = []
    for path, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            if module.in_proj_weight is not None:
                name, columns = f"{path}.in_proj".lstrip("."), module.in_proj_weight.shape[1]
                sites += _packed(path, name, columns, row_blocks(model, path), False)
        elif shape := out_and_in(module):
            own, transposed = not is_aside(path), is_conv1d(module)
            role = next((role for role, names in _ROLES.items() if own and matches(names, path)), "")
            if isinstance(module, nn.Conv2d):
                sites.append(Site(WeightShape(path, *shape), path, CONV))
            elif is_packed_linear(path) and (blocks := row_blocks(model, path)):
                sites += _packed(path, path, shape[1], blocks, transposed)
            else:
                sites.append(Site(WeightShape(path, *shape), path, "linear", role, transposed=transposed))
    return sites


def weight_key(model: nn.Module, site: Site) -> str:
    """Return the state-dict key of a site's weight."""
    name = "in_proj_weight" if isinstance(model.get_submodule(site.path), nn.MultiheadAttention) else "weight"
    return f"{site.path}.{name}".lstrip(".")


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


# Modules that no default selects: stems, patch embeddings, classifiers and language heads.
_ENDS = r"\w*stem\w*|patch_embed\w*|heads?|head_dist|(?:pre_)?classifier\w*|lm_head|embed_out|[Aa]ux\w*"
_GATE, _EXPERTS = r"gate|gating|wg|\w+_gate", r"\w*experts?(?:_\d+)?"
"""Linear layer that chooses the experts of a mixture, and the modules next to it that identify it."""


class Blocks:
    """Blocks of a model, without stem, patch embedding, classifier and language head.

    Blocks are members of lists and sequences that have child layers, and sibling layers of one class. Attention pooling
    is also a block. In a model without blocks everything except stem and head counts.

    Attributes:
        layers: Names of the weights of linear layers, attention and convolutions.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Site]) -> None:
        self.model, self.sites = model, list(sites)
        self._roots = _roots(model)
        self._ends = _ends(model, self.sites, bool(self._roots))
        self.layers = {weight_key(model, site) for site in self.sites}

    def has(self, site: Site) -> bool:
        """Return True if a layer is in a block and not a router of a mixture of experts."""
        return self._covers(site.path, bool(site.role)) and not is_router(self.model, site.path)

    def weights(self) -> dict[str, tuple[str, int]]:
        """Return path of the module and number of elements of each weight in the blocks, by name.

        A weight has more than one row and more than one column. Embeddings and stacked biases are not weights.
        """
        roles = {site.path for site in self.sites if site.role}
        weights: dict[str, tuple[str, int]] = {}
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            for key, tensor in module.named_parameters(recurse=False):
                name = f"{path}.{key}".lstrip(".")
                matrix = sum(size > 1 for size in tensor.shape) > 1 and not key.endswith("bias")
                matrix = matrix and not isinstance(module, nn.Embedding)
                if matrix and id(tensor) not in seen and self._covers(name, path in roles):
                    seen.add(id(tensor))
                    weights[name] = path, tensor.numel()
        return weights

    def _covers(self, path: str, role: bool) -> bool:
        above = {path[: dot.start()] for dot in re.finditer(r"\.", path)}
        inside = role or not self._roots or not self._roots.isdisjoint(above)
        return inside and self._ends.isdisjoint({path, *above})


def is_router(model: nn.Module, path: str) -> bool:
    """Return True if a layer chooses the experts of a mixture, or weighs them."""
    if any(re.fullmatch(r"\w*router\w*", part) for part in path.split(".")):
        return True
    parent, _, name = path.rpartition(".")
    return re.fullmatch(_GATE, name) is not None and any(
        re.fullmatch(_EXPERTS, beside) for beside, _ in model.get_submodule(parent).named_children()
    )


def _roots(model: nn.Module) -> set[str]:
    """Return the paths of the blocks and of their parents."""
    paths: set[str] = set()
    for path, module in model.named_modules():
        members = {name: child for name, child in module.named_children() if next(child.children(), None) is not None}
        kinds = Counter(type(child) for child in members.values())
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        paths |= {f"{path}.{name}".lstrip(".") for name, child in members.items() if listed or kinds[type(child)] > 1}
    return paths


def _ends(model: nn.Module, sites: list[Site], blocks: bool) -> set[str]:
    """Return the paths of stem and head modules: by name, by the model's methods, and the first convolution."""
    paths = {path for path, _ in model.named_modules() if re.fullmatch(_ENDS, path.rpartition(".")[2])}
    for method in ("get_classifier", "get_output_embeddings"):  # of timm and transformers
        try:
            answer: object = getattr(model, method)()
        except (AttributeError, NotImplementedError):  # also of a model without the method
            continue
        heads = answer if isinstance(answer, tuple | list) else [answer]
        paths |= {path for path, module in model.named_modules() if path and any(module is head for head in heads)}
    convolutions = [site.path for site in sites if site.kind == CONV]
    linear = [site.path for site in sites if site.kind != CONV and not site.role]
    paths |= set(convolutions[:1])
    if convolutions and not blocks:
        paths |= set(linear[-1:])  # the unnamed classifier after the last convolution of a plain sequence
    return paths


class Obstacle(NamedTuple):
    """Reason that a weight cannot have an update: in short for a list, and as a message."""

    short: str
    message: str


def obstacle(model: nn.Module, site: Site, owners: dict[int, list[str]]) -> Obstacle | None:
    """Return the reason that a site cannot have an update, or None.

    Args:
        model: Model with the site.
        site: Site to check.
        owners: Result of `owners_of` for the model.
    """
    module, layer = model.get_submodule(site.path), site.shape.layer
    sides = site.shape.out_features, site.shape.in_features
    if not all(sides):
        return Obstacle("no entries", f"{layer} has no entries ({sides[0]} x {sides[1]}). Leave it out of the targets.")
    if not is_packed(module):
        own = type(module)
        other = not isinstance(module, nn.Conv2d) and own.forward is not nn.Linear.forward
        if other and not is_conv1d(module) and not is_quantized(module):
            return Obstacle(
                "forward of its own", f"{layer} is a {own.__name__} with its own forward: an update has no effect."
            )
        if "weight" not in dict(module.named_parameters(recurse=False)):
            return Obstacle(
                "computes its weight",
                f"{layer} computes its weight (a parametrization, such as weight_norm). Remove the parametrization.",
            )
        reader = reader_of(model, site.path)
        called = own.forward is not nn.Linear.forward or is_quantized(module)
        if reader is not None and (called or issubclass(reader, nn.MultiheadAttention)):
            return Obstacle(
                f"{reader.__name__} reads its weight",
                f"{layer}: {reader.__name__} reads its weight instead of calling the layer, so an update would never "
                "act. Leave it out of the targets, for example with --model.targets '[mlp]'.",
            )
    names = owners[id(module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight)]
    if len(names) > 1:
        return Obstacle(
            "shared weight",
            f"{layer} shares its weight with another module ({', '.join(names)}), which merging would change too. "
            "Leave it out of the targets.",
        )
    return None


def is_packed(module: nn.Module) -> bool:
    """Return True if a module is an attention layer whose forward `AdaptedAttention` can replace."""
    return type(module) is nn.MultiheadAttention and module.in_proj_weight is not None


def reader_of(model: nn.Module, path: str) -> type[nn.Module] | None:
    """Return the class of a parent module that reads a layer's weight instead of calling the layer, or None."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if is_packed(parent) or type(parent).forward is nn.TransformerEncoderLayer.forward:
        return None  # handled: the output projection is called, the fast path is switched off
    parts = path.split(".")
    for depth in range(len(parts) if path else 0):
        above = type(model.get_submodule(".".join(parts[:depth])))
        if issubclass(above, nn.MultiheadAttention) and depth == len(parts) - 1:
            return above
        source, read = _source(above), f"self.{'.'.join(parts[depth:])}.weight"  # type: ignore[arg-type]
        if read in source and re.search(  # compiling an expression for each layer takes seconds
            rf"\b{re.escape(read)}\b(?!\.(?:dtype|device|shape|requires_grad))", source
        ):
            return above
    return None


@functools.cache
def _source(kind: type[nn.Module]) -> str:
    """Return the source of a class's methods, except initialization of weights; "" if it is not available."""
    sources = []
    for name, function in inspect.getmembers(kind, inspect.isfunction):
        if not re.search("init|reset|load|fuse|reparam", name) and getattr(nn.Module, name, None) is not function:
            with suppress(OSError, TypeError):
                sources.append(inspect.getsource(function))
    return "\n".join(sources)


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter, by id; tied parameters have several."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return owners
