"""Which weights of a model an adapter attaches to: layer names, the roles that aliases name, and towers."""

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from randlora_pl.adapters.base import WeightShape, matches
from randlora_pl.adapters.fused import BLOCKS, row_blocks
from randlora_pl.adapters.weights import is_conv1d, is_quantised, out_and_in
from randlora_pl.errors import UserError, near

DEFAULT_TARGETS = ["qkv", "fc1", "fc2"]
"""The paper's choice: the packed q/k/v weight and both MLP matrices of every block."""

# Field names of a block's weights in open_clip, timm, PyTorch and transformers; the first role that fits counts.
_ROLES = {
    "qkv": r"in_proj|qkv|qkv_proj|Wqkv|c_attn",
    "q": r"q|q_proj|q_lin|query|query_proj|to_q",
    "k": r"k|k_proj|k_lin|key|key_proj|to_k",
    "v": r"v|v_proj|v_lin|value|value_proj|to_v",
    "o": r"(?:\w*attn\w*|\w*attention\w*)\.(?:out_proj|out_lin|proj|o_proj|c_proj|output\.dense)",
    "fc1": r"c_fc|fc1|linear1|lin1|intermediate\.dense|up_proj|gate_up_proj",
    "fc2": r"mlp\.c_proj|fc2|linear2|lin2|output\.dense|down_proj",
    "gate": r"gate_proj",
}
_ALIASES = {
    "qkv": ("qkv", "q", "k", "v"),
    "attn": ("qkv", "q", "k", "v", "o"),
    "mlp": ("fc1", "fc2"),
    "all": tuple(_ROLES),
} | {role: (role,) for role in ("q", "k", "v", "o", "fc1", "fc2", "gate")}


@dataclass(frozen=True)
class Site:
    """One weight, or one row block of it, that can take an update.

    Attributes:
        shape: The name under which the update is known, and its size.
        path: Path of the module that owns the weight.
        kind: ``linear``, or ``q``, ``k``, ``v`` or ``qkv`` of a packed weight.
        role: What it does in a block (``qkv q k v o fc1 fc2 gate``), empty if unknown.
        block: Name of the row block, None for the whole weight.
        rows: First and last row + 1 of the block.
        turned: Whether the module stores its weight as (in, out).
    """

    shape: WeightShape
    path: str
    kind: str
    role: str = ""
    block: str | None = None
    rows: tuple[int, int] | None = None
    turned: bool = False


def find_sites(model: nn.Module) -> list[Site]:
    """Every weight that can be adapted: linear layers and attention weights, packed and block by block."""
    return [site for path, module in model.named_modules() for site in _sites_of(model, path, module)]


def _sites_of(model: nn.Module, path: str, module: nn.Module) -> Iterator[Site]:
    if type(module) is nn.MultiheadAttention:
        if module.in_proj_weight is not None:
            name, columns = f"{path}.in_proj".lstrip("."), module.in_proj_weight.shape[1]
            yield from _packed(path, name, columns, row_blocks(model, path), False)
    elif shape := out_and_in(module):
        role = next((role for role, names in _ROLES.items() if matches(names, path)), "")
        turned = is_conv1d(module)
        if is_packed_linear(path) and (blocks := row_blocks(model, path)):
            yield from _packed(path, path, shape[1], blocks, turned)
        else:
            yield Site(WeightShape(path, *shape), path, "linear", role, turned=turned)


def is_packed_linear(path: str) -> bool:
    """Whether a linear layer of this name is one for q, k and v together."""
    return matches(_ROLES["qkv"], path)


def _packed(path: str, name: str, columns: int, blocks: dict[str, tuple[int, int]], turned: bool) -> Iterator[Site]:
    yield Site(WeightShape(name, blocks["v"][1], columns), path, "qkv", "qkv", turned=turned)
    for block, rows in blocks.items():
        shape = WeightShape(f"{path}.{block}".lstrip("."), rows[1] - rows[0], columns)
        yield Site(shape, path, block, block, block, rows, turned)


def select(model: nn.Module, targets: list[str] | None, split: bool) -> list[Site]:
    """The sites that a list of targets names, in the model's order.

    Args:
        model: Any module.
        targets: Regular expressions over layer names, or aliases, each with an optional tower prefix
            (``visual:mlp``). None is the paper's choice where the model has those layers, and every
            linear layer otherwise.
        split: Whether packed q/k/v weights are adapted block by block.

    Raises:
        UserError: If a target matches nothing, or a matched layer cannot be adapted.
    """
    sites = find_sites(model)
    if not sites:
        raise UserError(f"{type(model).__name__} has no linear or attention layer that an adapter could attach to.")
    roles = any(site.role in _ALIASES["qkv"] + _ALIASES["mlp"] for site in sites)
    if targets is not None and not targets:
        raise UserError("targets is empty: name layers or aliases (--model.targets '[qkv, mlp]'), or leave it out.")
    if targets is None:
        targets = DEFAULT_TARGETS if roles else ["all"]
        _refuse_raw_attention(model, targets[0], sites)
        targets = [alias for alias in targets if _of_target(alias, sites)]
    chosen: set[str] = set()
    for target in targets:
        found = _of_target(target, sites)
        _refuse_raw_attention(model, target, sites)
        if not found:
            raise UserError(_no_match(target, sites))
        chosen.update(site.shape.layer for site in found)
    picked = [site for site in sites if site.shape.layer in chosen]
    whole = {site.path for site in picked if site.kind == "qkv"}
    if split:  # the whole packed weight stands for its three blocks
        picked = [site for site in sites if (site.path in whole and site.block) or site in picked]
        picked = [site for site in picked if site.kind != "qkv"]
    else:
        picked = [site for site in picked if not (site.block and site.path in whole)]
    owners = _owners(model)
    for site in picked:
        if split and site.role == "qkv":
            raise UserError(f"qkv is split: {_unknown_blocks(site)}")
        _refuse_bypassed(model, site)
        _refuse_tied(model, site, owners)
    return picked


def _of_target(target: str, sites: list[Site]) -> list[Site]:
    """The sites of one target; aliases mean whole packed weights unless they name a block."""
    tower, name = _split_tower(target)
    within = [site for site in sites if _in_tower(site.path, tower, sites)]
    if name not in _ALIASES:
        try:
            return [site for site in within if matches(name, site.shape.layer)]
        except re.error as error:
            raise UserError(f"target {target!r} is not a regular expression: {error}.") from None
    found = [site for site in within if site.role in _ALIASES[name]]
    if name == "all" and not found and not any(site.role for site in sites):
        return within
    if len(_ALIASES[name]) > 1:
        found = [site for site in found if not site.block]
    return found


def _split_tower(target: str) -> tuple[str | None, str]:
    prefixed = re.fullmatch(r"([A-Za-z_]\w*):(?!:)(.+)", target)
    return (prefixed[1], prefixed[2]) if prefixed else (None, target)


def _in_tower(path: str, tower: str | None, sites: list[Site]) -> bool:
    """Whether a module is in a tower; open_clip keeps the text tower at the top, beside ``visual``."""
    if tower is None:
        return True
    if tower == "text" and not any(site.path.startswith("text.") for site in sites):
        return any(site.path.startswith("visual.") for site in sites) and not path.startswith("visual.")
    return path.startswith(f"{tower}.")


def _unknown_blocks(site: Site) -> str:
    layer, size = site.shape.layer, f"{site.shape.out_features} x {site.shape.in_features}"
    return f"{layer} ({size}) is fused, and nothing says which of its rows are q, k and v. Adapt it whole: qkv, packed."


def _no_match(target: str, sites: list[Site]) -> str:
    tower, name = _split_tower(target)
    fused = [site for site in sites if site.role == "qkv" and not site.block and _in_tower(site.path, tower, sites)]
    if name in BLOCKS and fused:
        return f"target {target!r}: {_unknown_blocks(fused[0])}"
    names = [site.shape.layer for site in sites if not site.block]
    if tower is not None and not any(_in_tower(site.path, tower, sites) for site in sites):
        towers = sorted({path.split(".")[0] for path in names})
        return f"target {target!r}: this model has no tower {tower!r}. Top-level parts: {', '.join(towers)}."
    last = {path.rpartition(".")[2]: None for path in names}  # which is what most targets are
    hint = near(name, [*_ALIASES, *last, *names]) or f" Layers are named as {names[0]!r} ... {names[-1]!r}."
    return f"target {target!r} matches no layer of the model.{hint} Aliases: {' '.join(_ALIASES)}."


def _refuse_raw_attention(model: nn.Module, target: str, sites: list[Site]) -> None:
    """Refuses an alias that stands for q, k or v where attention keeps them out of an update's reach.

    These are subclasses of ``nn.MultiheadAttention``, those with a separate weight for each input, and
    modules with a raw parameter, such as open_clip's own ``Attention``.
    """
    tower, name = _split_tower(target)
    if not set(BLOCKS) & set(_ALIASES.get(name, ())):
        return
    for path, module in model.named_modules():
        keys = {key for key, _ in module.named_parameters(recurse=False)}
        raw = isinstance(module, nn.MultiheadAttention) or not keys.isdisjoint({"in_proj_weight", "q_proj_weight"})
        if raw and _in_tower(path, tower, sites) and not _is_packed(module):
            raise UserError(
                f"target {target!r}: {path} ({type(module).__name__}) keeps its q/k/v weights where no update reaches "
                "them, and would be left out. Name the layers to adapt, for example --model.targets '[mlp]'."
            )


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is an attention layer whose forward can be taken over."""
    return type(module) is nn.MultiheadAttention and module.in_proj_weight is not None


def _refuse_bypassed(model: nn.Module, site: Site) -> None:
    """Refuses a layer whose weight is read by a module above it, not called: an update would never act."""
    module, parent = model.get_submodule(site.path), model.get_submodule(site.path.rpartition(".")[0])
    if _is_packed(module):
        return
    own, layer = type(module), site.shape.layer
    if own.forward is not nn.Linear.forward and not is_conv1d(module) and not is_quantised(module):
        raise UserError(f"{layer} is a {own.__name__} with a forward of its own; an update would not act.")
    if "weight" not in dict(module.named_parameters(recurse=False)):
        raise UserError(f"{layer} computes its weight (a parametrization, such as weight_norm): remove that first.")
    if _is_packed(parent) or type(parent).forward is nn.TransformerEncoderLayer.forward:
        return  # both are handled: the output projection is called, the fast path is switched off
    parts = site.path.split(".")
    for depth in range(len(parts) if site.path else 0):
        above: Any = type(model.get_submodule(".".join(parts[:depth])))
        name = re.escape(".".join(parts[depth:]))
        read = re.search(rf"\bself\.{name}\.weight\b(?!\.(?:dtype|device|shape|requires_grad))", _source(above))
        if read or (issubclass(above, nn.MultiheadAttention) and depth == len(parts) - 1):
            raise UserError(
                f"{layer}: {above.__name__} reads its weight instead of calling the layer, so an update would never "
                "act. Leave it out of the targets, for example with --model.targets '[mlp]'."
            )


@functools.cache
def _source(kind: Any) -> str:
    """The source of a class's methods, without those that set weights up; empty where it is not to be had."""
    own = (
        function
        for name, function in inspect.getmembers(kind, inspect.isfunction)
        if not re.search("init|reset|load|fuse", name) and getattr(nn.Module, name, None) is not function
    )
    sources = []
    for function in own:
        try:
            sources.append(inspect.getsource(function))
        except (OSError, TypeError):
            continue
    return "\n".join(sources)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Every parameter's names, by its id: tied ones have several."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return owners


def _refuse_tied(model: nn.Module, site: Site, owners: dict[int, list[str]]) -> None:
    """Refuses a weight that several modules share: merging one update would change the others."""
    module = model.get_submodule(site.path)
    names = owners[id(module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight)]
    if len(names) > 1:
        raise UserError(
            f"{site.shape.layer} shares its weight with another module ({', '.join(names)}), which merging would "
            "change too. Leave it out of the targets."
        )
