"""Which weights of a model an adapter attaches to: the default, layer names, the aliases of roles, and towers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from randlora_pl.adapters.base import Adapter, matches
from randlora_pl.adapters.budget import parse_budget
from randlora_pl.adapters.layers.qkv_rows import BLOCKS
from randlora_pl.adapters.targets.blocks import of_blocks
from randlora_pl.adapters.targets.obstacles import Obstacle, obstacle, owners_of, raw_attention
from randlora_pl.adapters.targets.sites import ALIASES, CONV, Site, find_sites, is_aside
from randlora_pl.utils.errors import UserError, near

DEFAULT_TARGETS = ["qkv", "fc1", "fc2"]
"""The paper's choice: the packed q/k/v weight and both MLP matrices of every block."""


@dataclass(frozen=True)
class Selection:
    """The weights that an adapter attaches to.

    Attributes:
        sites: The weights, in the model's order.
        skipped: Layers that the default or an alias would take and that take no update, with the reason.
        paper: Whether the paper's choice was made because nothing was asked for.
    """

    sites: list[Site]
    skipped: dict[str, str] = field(default_factory=dict)
    paper: bool = False


def select(model: nn.Module, targets: list[str] | None, split: bool) -> list[Site]:
    """The sites that a list of targets names, in the model's order; `choose` for any adapter."""
    return choose(model, targets, split).sites


def choose(model: nn.Module, targets: list[str] | None, split: bool, adapter: Adapter | None = None) -> Selection:
    """The sites that a list of targets names.

    Args:
        model: Any module.
        targets: Regular expressions over layer names, or aliases, each with an optional tower prefix
            (``visual:mlp``). None is the paper's choice where the model has those layers. Elsewhere it is every
            linear layer of the blocks, and their convolutions where the blocks have no linear layer.
        split: Whether packed q/k/v weights are adapted block by block.
        adapter: Leaves out layers that are too small for its rank, unless they are named.

    Raises:
        UserError: If a target matches nothing, or a named layer cannot be adapted.
    """
    sites = find_sites(model)
    if not sites:
        what = "linear, attention or convolution layer"
        raise UserError(f"{type(model).__name__} has no {what} that an adapter could attach to.")
    if targets is not None and not targets:
        raise UserError("targets is empty: name layers or aliases (--model.targets '[qkv, mlp]'), or leave it out.")
    blocks = of_blocks(model, sites)
    if targets is None:
        _refuse_raw_attention(model, "qkv", sites)
        named, every, paper = _default(sites, blocks)
        if not named | every:
            raise UserError(
                f"{type(model).__name__} has no layer besides its stem and its head. Name the layers to adapt, for "
                f"example --model.targets '[{re.escape(sites[-1].shape.layer)}]'."
            )
    else:
        named, every, paper = set(), set(), False
        for target in targets:
            found = _of_target(target, sites, blocks)
            _refuse_raw_attention(model, target, sites)
            if not found:
                raise UserError(_no_match(target, sites))
            (every if _split_tower(target)[1] in ("all", CONV) else named).update(_layers(found))
    picked = _packed_or_split([site for site in sites if site.shape.layer in named | every], sites, split)
    kept, skipped = [], {}
    owners = owners_of(model)
    first: Obstacle | None = None
    for site in picked:
        if split and site.role == "qkv":
            raise UserError(f"qkv is split: {_unknown_blocks(site)}")
        problem = obstacle(model, site, owners)
        if site.shape.layer in named:
            if problem is not None:
                raise UserError(problem.message)
            kept.append(site)
            continue
        if problem is None and adapter is not None:
            problem = _too_small(adapter, site, model)
        if problem is None:
            kept.append(site)
            continue
        first = first or problem
        skipped[site.shape.layer] = problem.short
    if not kept and first is not None:
        raise UserError(first.message)
    return Selection(kept, skipped, paper)


def _layers(sites: Iterable[Site]) -> set[str]:
    return {site.shape.layer for site in sites}


def _default(sites: list[Site], blocks: list[Site]) -> tuple[set[str], set[str], bool]:
    """Layers of the paper's choice, other layers, and whether the paper's choice is all; open_clip's towers apart."""
    named: set[str] = set()
    every: set[str] = set()
    towers = [[site for site in blocks if site.path.startswith("visual.") == visual] for visual in (False, True)]
    for tower in towers:
        roles = {site.role for site in tower if not site.block}
        whole = any(roles.issuperset(kinds) for kinds in (["qkv"], ["q", "k", "v"], ["q", "kv"], ["qk", "v"]))
        if whole and {"fc1", "fc2"} <= roles:
            for alias in DEFAULT_TARGETS:
                named |= _layers(_of_target(alias, tower, tower))
            continue
        linear = [site for site in tower if site.kind != CONV and not site.block and not is_aside(site.path)]
        every |= _layers(linear)
        if all(_pools(site) for site in linear):
            every |= _layers(site for site in tower if site.kind == CONV)
    return named, every, not every


def _pools(site: Site) -> bool:
    """Return True if a layer belongs to an attention layer that pools what the blocks give."""
    return matches(r"attn_?pool\..*", site.path)


def _packed_or_split(picked: list[Site], sites: list[Site], split: bool) -> list[Site]:
    """The whole packed weights or their row blocks, as far as both are picked."""
    whole = {site.path for site in picked if site.kind == "qkv"}
    if not split:
        return [site for site in picked if not (site.block and site.path in whole)]
    # The whole packed weight stands for its three blocks.
    picked = [site for site in sites if (site.path in whole and site.block) or site in picked]
    return [site for site in picked if site.kind != "qkv"]


def _too_small(adapter: Adapter, site: Site, model: nn.Module) -> Obstacle | None:
    """The obstacle of a rank above the smaller side of a weight, of a matched budget or of the adapter itself.

    None where ranks are given by pattern: those are meant for the layers that they name.
    """
    if isinstance(adapter.rank, dict):
        return None
    try:
        if adapter.match is None:
            adapter.count(site.shape)
        else:
            parse_budget(adapter.match, [site.shape], model)
    except UserError as error:
        return Obstacle(f"rank above {site.shape.small}", str(error))
    return None


def _of_target(target: str, sites: list[Site], blocks: list[Site]) -> list[Site]:
    """The sites of one target; aliases mean whole packed weights unless they name a block."""
    tower, name = _split_tower(target)
    if name not in ALIASES:
        try:
            return [s for s in sites if _in_tower(s.path, tower, sites) and matches(name, s.shape.layer)]
        except re.error as error:
            raise UserError(f"target {target!r} is not a regular expression: {error}.") from None
    if name in ("all", CONV):
        found = [site for site in blocks if (site.kind == CONV) == (name == CONV)]
    else:
        found = [site for site in sites if site.role in ALIASES[name]]
    found = [site for site in found if _in_tower(site.path, tower, sites)]
    return [site for site in found if not site.block] if len(ALIASES[name]) > 1 else found


def _split_tower(target: str) -> tuple[str | None, str]:
    prefixed = re.fullmatch(r"([A-Za-z_]\w*):(?!:)(.+)", target)
    return (prefixed[1], prefixed[2]) if prefixed else (None, target)


def _in_tower(path: str, tower: str | None, sites: list[Site]) -> bool:
    """Return True if a module is in a tower; open_clip keeps the text tower at the top, beside ``visual``."""
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
    if name in ("all", CONV) and tower is None:
        kind, other = ("linear layer", CONV) if name == "all" else ("convolution", "all")
        return f"target {target!r}: the model's blocks have no {kind}. Try {other!r}, or name layers."
    if tower is not None and not any(_in_tower(site.path, tower, sites) for site in sites):
        towers = sorted({path.split(".")[0] for path in names})
        return f"target {target!r}: this model has no tower {tower!r}. Top-level parts: {', '.join(towers)}."
    last = {path.rpartition(".")[2]: None for path in names}  # which is what most targets are
    others = [other for other in (*ALIASES, *last, *names) if other != name]
    hint = near(name, others) or f" Layers are named as {names[0]!r} ... {names[-1]!r}."
    return f"target {target!r} matches no layer of the model.{hint} Aliases: {' '.join(ALIASES)}."


def _refuse_raw_attention(model: nn.Module, target: str, sites: list[Site]) -> None:
    """Refuses an alias that stands for q, k or v where attention keeps them out of an update's reach."""
    tower, name = _split_tower(target)
    if not set(BLOCKS) & set(ALIASES.get(name, ())):
        return
    for path, kind in raw_attention(model).items():
        if _in_tower(path, tower, sites):
            raise UserError(
                f"target {target!r}: {path} ({kind}) keeps its q/k/v weights where no update reaches "
                "them, and would be left out. Name the layers to adapt, for example --model.targets '[mlp]'."
            )
