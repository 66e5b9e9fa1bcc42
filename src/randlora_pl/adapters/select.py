"""Selection of the weights to adapt (default, layer names, aliases of roles, towers), and of a size by a budget."""

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from inspect import signature

from torch import nn

from randlora_pl.adapters import methods
from randlora_pl.adapters.base import Adapter
from randlora_pl.adapters.random_bases import WeightShape, matches
from randlora_pl.adapters.sites import (
    ALIASES,
    BLOCKS,
    CONV,
    Blocks,
    Obstacle,
    Site,
    find_sites,
    is_aside,
    is_packed,
    obstacle,
    owners_of,
)
from randlora_pl.utils.errors import UserError, near

_REFUSED = 1 << 62
"""Count of a size that a method refuses."""


def count_parameters(adapter: Adapter, shapes: list[WeightShape]) -> int:
    """Return the trainable parameters of an adapter on these weights."""
    return sum(adapter.count(shape) for shape in shapes)


def _parse_budget(text: str, shapes: list[WeightShape], model: nn.Module) -> int:
    """Return the trainable parameters of ``method:number`` (such as ``lora:32``) or ``full`` on these weights."""
    name, _, number = text.lower().partition(":")
    if name == "full" and not number:
        return sum(parameter.numel() for parameter in model.parameters())
    kind = next((getattr(methods, method) for method in methods.__all__ if method.lower() == name), None)
    sized = kind is not None and kind.size_option in signature(kind).parameters
    if kind is None or not sized or not number.isdecimal() or int(number) < kind().sizes(shapes)[0]:
        raise UserError(f"match is {text!r}. Set a method and a number (lora:32, randlora:6, nola:1024), or full.")
    return count_parameters(kind(**{kind.size_option: int(number)}), shapes)


def _find_matched(adapter: Adapter) -> Adapter | None:
    """Return the adapter, or the one inside it, whose option ``match`` is set; None if there is none."""
    matched = [each for each in adapter.leaves() if each.match is not None]
    if len(matched) > 1:
        raise UserError(
            f"{' and '.join(each.method() for each in matched)} have match. Keep one, and set the other sizes."
        )
    return matched[0] if matched else None


def match_budget(adapter: Adapter, shapes: list[WeightShape], model: nn.Module) -> tuple[Adapter, list[str]]:
    """Return the adapter with the size whose trainable parameters are closest to its ``match``.

    The size is the option that `Adapter.size_option` names, such as the rank, of the one adapter inside that has
    ``match``. The count is of the adapter as a whole.

    Args:
        adapter: Adapter; without ``match`` it is returned unchanged.
        shapes: Weights to adapt.
        model: Model, for the count of full fine-tuning.

    Returns:
        The adapter, and notes with both counts.

    Raises:
        UserError: The budget is not valid, the count of every size differs from it by more than half of it, or the
            method has no size to choose.
    """
    leaf = _find_matched(adapter)
    if leaf is None or leaf.match is None:
        return adapter, []
    match, option, budget = leaf.match, leaf.size_option, _parse_budget(leaf.match, shapes, model)
    if option not in signature(type(leaf)).parameters:
        raise UserError(f"{leaf.method()} has no {option} to match to {match}. Leave out its option match.")

    def sized(number: int) -> Adapter:
        return adapter.exchanged(leaf, leaf.replace(**{option: number, "match": None}))

    @cache
    def count(number: int) -> int:
        try:
            return count_parameters(sized(number), shapes)
        except UserError:  # too large for a weight
            return _REFUSED

    sizes = leaf.sizes(shapes)
    if len(sizes) > 10_000:  # too many to try one by one
        above = bisect_left(sizes, budget, key=count)
        sizes = sizes[max(0, above - 1) : above + 1]
    # Not every count rises with the size: RandLoRA's falls, but d/r is rounded up. So all of a few sizes are tried.
    best, *others = sorted(sizes, key=lambda number: abs(count(number) - budget))
    count_parameters(sized(best), shapes)  # raises if no size fits
    others = [number for number in others if count(number) < _REFUSED]
    if abs(count(best) - budget) > budget / 2:
        near = " and ".join(f"{number} ({count(number):,})" for number in sorted([best, *others[:1]]))
        near += " are nearest" if others else " is nearest"
        inside = "" if leaf is adapter else f" in {adapter.method()}"
        mend = f"Set {option}{inside and f' of {leaf.method()}'} instead of match"
        mend += ", or make the other parts smaller." if inside and count(best) > budget else "."
        raise UserError(
            f"no {option} of {leaf.method()}{inside} comes near {match} ({budget:,} parameters): {near}. {mend}"
        )
    note = f"matched to {match}: {option} {best} has {count(best):,} parameters, {match} {budget:,}"
    return sized(best), [f"{note} ({100 * (count(best) / budget - 1):+.1f} %)"]


DEFAULT_TARGETS = ["qkv", "fc1", "fc2"]
"""Default of the paper: the packed q/k/v weight and both MLP matrices of every block."""


@dataclass(frozen=True)
class Selection:
    """Weights to adapt.

    Attributes:
        sites: Weights, in model order.
        skipped: Layers of the default or an alias that cannot have an update, with the reason.
        paper: True if the paper's default was used, because no targets were given.
    """

    sites: list[Site]
    skipped: dict[str, str] = field(default_factory=dict)
    paper: bool = False


def select(model: nn.Module, targets: list[str] | None, split: bool) -> list[Site]:
    """Return the sites that a list of targets selects, in model order; see `choose`."""
    return choose(model, targets, split).sites


def choose(model: nn.Module, targets: list[str] | None, split: bool, adapter: Adapter | None = None) -> Selection:
    """Return the selection of a list of targets.

    Args:
        model: Any module.
        targets: Regular expressions over layer names, or aliases, each with an optional tower prefix
            (``visual:mlp``). None is the paper's default if the model has these layers; otherwise all linear layers
            of the blocks, or their convolutions if the blocks have no linear layer.
        split: True to adapt packed q/k/v weights block by block.
        adapter: Adapter whose rank excludes layers that are too small, unless they are named.

    Raises:
        UserError: A target matches nothing, or a named layer cannot be adapted.
    """
    sites = find_sites(model)
    if not sites:
        what = "linear, attention or convolution layer"
        raise UserError(f"{type(model).__name__} has no {what} that an adapter could attach to.")
    if targets is not None and not targets:
        raise UserError("targets is empty. Set layers or aliases (--model.targets '[qkv, mlp]'), or remove the option.")
    whole = Blocks(model, sites)
    blocks = [site for site in sites if whole.has(site)]
    if targets is None:
        _refuse_raw_attention(model, "qkv", sites)
        named, every, paper = _default(sites, blocks)
        if not named | every:
            raise UserError(
                f"{type(model).__name__} has no layer except its stem and its head. Name the layers to adapt, for "
                f"example --model.targets '[{re.escape(sites[-1].shape.layer)}]'."
            )
    else:
        named, every, paper = set(), set(), False
        for target in targets:
            chosen = _of_target(target, sites, blocks)
            _refuse_raw_attention(model, target, sites)
            if not chosen:
                raise UserError(_no_match(target, sites))
            (every if _split_tower(target)[1] in ("all", CONV) else named).update(_layers(chosen))
    picked = [site for site in sites if site.shape.layer in named | every]
    packed = {site.path for site in picked if site.kind == "qkv"}
    if split:  # a packed weight is replaced by its three blocks
        picked = [site for site in sites if (site.path in packed and site.block) or site in picked]
        picked = [site for site in picked if site.kind != "qkv"]
    else:
        picked = [site for site in picked if not (site.block and site.path in packed)]
    kept, skipped = [], {}
    owners = owners_of(model)
    first: Obstacle | None = None
    for site in picked:
        if split and site.role == "qkv":
            raise UserError(f"qkv is split: {_unknown_blocks(site)}")
        problem = obstacle(model, site, owners)
        typed = targets is not None and site.shape.layer in named
        if typed and problem is not None:
            raise UserError(problem.message)
        if problem is None and adapter is not None and not typed:
            problem = _too_small(adapter, site, model)
        if problem is None:
            kept.append(site)
        else:
            first = first or problem
            skipped[site.shape.layer] = problem.short
    if not kept and first is not None:
        raise UserError(first.message)
    return Selection(kept, skipped, paper)


def choose_beside(model: nn.Module, targets: list[str] | None, adapter: Adapter, beside: Collection[str]) -> Selection:
    """Return the weights of the targets (`choose`), without fully trained weights.

    Args:
        model: Any module.
        targets: See `choose`.
        adapter: Method and its options.
        beside: Names of fully trained tensors.

    Raises:
        UserError: See `choose`; or no weight is left.
    """
    chosen = choose(model, targets, adapter.qkv == "split", adapter)
    left = [site for site in chosen.sites if not trains_whole(site.path, beside)]
    if not left:
        first = chosen.sites[0].shape.layer
        raise UserError(
            f"every layer of the targets is in trained ({first} ...), so nothing is adapted. Change one of them."
        )
    return Selection(left, chosen.skipped, chosen.paper)


def trains_whole(path: str, beside: Collection[str]) -> bool:
    """Return True if a layer's weight is one of the fully trained tensors."""
    return any(f"{path}.{name}".lstrip(".") in beside for name in ("weight", "in_proj_weight"))


def _layers(sites: Iterable[Site]) -> set[str]:
    return {site.shape.layer for site in sites}


def _default(sites: list[Site], blocks: list[Site]) -> tuple[set[str], set[str], bool]:
    """Return layers of the paper's default, other layers, and True without other layers; by tower for open_clip."""
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
        if all(matches(r"attn_?pool\..*", site.path) for site in linear):  # attention pooling
            every |= _layers(site for site in tower if site.kind == CONV)
    return named, every, not every


def _too_small(adapter: Adapter, site: Site, model: nn.Module) -> Obstacle | None:
    """Return an obstacle if the rank, of the adapter or of its matched budget, exceeds the weight's smaller side.

    Return None if ranks are given by pattern, because then they are meant for the named layers.
    """
    if isinstance(getattr(adapter, "rank", None), dict):
        return None
    try:
        leaf = _find_matched(adapter)
        if leaf is None or leaf.match is None:
            adapter.count(site.shape)
        else:
            _parse_budget(leaf.match, [site.shape], model)
    except UserError as error:
        sizes = {each.size_option for each in adapter.leaves()}
        return Obstacle(f"rank above {site.shape.small}" if "rank" in sizes else "no size fits it", str(error))
    return None


def _of_target(target: str, sites: list[Site], blocks: list[Site]) -> list[Site]:
    """Return the sites of one target; aliases select packed weights unless they name a block."""
    tower, name = _split_tower(target)
    if name not in ALIASES:
        try:
            return [s for s in sites if _in_tower(s.path, tower, sites) and matches(name, s.shape.layer)]
        except re.error as error:
            raise UserError(f"target {target!r} is not a regular expression: {error}.") from None
    if name in ("all", CONV):
        chosen = [site for site in blocks if (site.kind == CONV) == (name == CONV)]
    else:
        chosen = [site for site in sites if site.role in ALIASES[name]]
    chosen = [site for site in chosen if _in_tower(site.path, tower, sites)]
    return [site for site in chosen if not site.block] if len(ALIASES[name]) > 1 else chosen


def _split_tower(target: str) -> tuple[str | None, str]:
    prefixed = re.fullmatch(r"([A-Za-z_]\w*):(?!:)(.+)", target)
    return (prefixed[1], prefixed[2]) if prefixed else (None, target)


def _in_tower(path: str, tower: str | None, sites: list[Site]) -> bool:
    """Return True if a module is in a tower; open_clip's text tower is at the top level, next to ``visual``."""
    if tower is None:
        return True
    if tower == "text" and not any(site.path.startswith("text.") for site in sites):
        return any(site.path.startswith("visual.") for site in sites) and not path.startswith("visual.")
    return path.startswith(f"{tower}.")


def _unknown_blocks(site: Site) -> str:
    layer, size = site.shape.layer, f"{site.shape.out_features} x {site.shape.in_features}"
    return f"{layer} ({size}) is fused, and its rows of q, k and v are unknown. Adapt it as a whole: qkv, packed."


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
    last = {path.rpartition(".")[2]: None for path in names}  # most targets are last components
    others = [other for other in (*ALIASES, *last, *names) if other != name]
    hint = near(name, others) or f" Layers are named as {names[0]!r} ... {names[-1]!r}."
    return f"target {target!r} matches no layer of the model.{hint} Aliases: {' '.join(ALIASES)}."


def _refuse_raw_attention(model: nn.Module, target: str, sites: list[Site]) -> None:
    """Raise an error for an alias of q, k or v if attention modules have weights that cannot be adapted.

    These are subclasses of ``nn.MultiheadAttention``, modules with separate weights per input, and modules with a raw
    parameter, such as open_clip's ``Attention``.
    """
    tower, name = _split_tower(target)
    if not set(BLOCKS) & set(ALIASES.get(name, ())):
        return
    for path, module in model.named_modules():
        keys = {key for key, _ in module.named_parameters(recurse=False)}
        raw = isinstance(module, nn.MultiheadAttention) or not keys.isdisjoint({"in_proj_weight", "q_proj_weight"})
        if raw and not is_packed(module) and _in_tower(path, tower, sites):
            raise UserError(
                f"target {target!r}: {path} ({type(module).__name__}) stores its q/k/v weights in a way that "
                "cannot be adapted. Set the layers to adapt, for example --model.targets '[mlp]'."
            )
