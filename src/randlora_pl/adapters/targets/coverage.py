"""Adapted and skipped layers of an injection, counted and weighed, for reports and start summaries."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from randlora_pl.adapters.targets.blocks import Blocks, is_router
from randlora_pl.adapters.targets.select import Selection
from randlora_pl.adapters.targets.sites import CONV, Site, find_sites
from randlora_pl.adapters.trained import trains_whole

_MOST_GROUPS = 4


@dataclass(frozen=True)
class Coverage:
    """Adapted part of a model.

    Attributes:
        line: One-line summary of adapted and skipped layers.
        share: Adapted or fully trained part of the weights (tensors with two dimensions or more) of the blocks.
        frozen: Number of frozen weights of the blocks by name pattern, the largest first.
        warning: Warning if a selection that the user did not name leaves out more than a half, else "".
    """

    line: str = ""
    share: float = 1.0
    frozen: Mapping[str, int] = field(default_factory=dict)
    warning: str = ""


def coverage(model: nn.Module, targets: list[str] | None, selection: Selection, beside: Collection[str]) -> Coverage:
    """Return what a selection adapts of a model.

    Args:
        model: Model without the adapter.
        targets: Requested targets.
        selection: Selected weights.
        beside: Names of fully trained tensors, whose layers do not count as skipped.
    """
    sites = [site for site in find_sites(model) if not site.block]
    blocks = Blocks(model, sites)
    adapted = {site.path for site in selection.sites}
    parts, left = [], []
    for name, convolution in (("linear layers", False), ("convolutions", True)):
        mine = [site for site in sites if (site.kind == CONV) == convolution]
        if not mine:
            continue
        chosen = [site for site in mine if site.path in adapted]
        every = sum(blocks.has(site) for site in mine)
        remarks = ["the paper's choice"] if selection.paper and not convolution else []
        remarks += [f"`{CONV if convolution else 'all'}`: {every}"] if every not in (0, len(chosen)) else []
        parts.append(f"{len(chosen)} of {len(mine)} {name}" + (f" ({'; '.join(remarks)})" if remarks else ""))
        left += [site for site in mine if site.path not in adapted] if chosen or not convolution else []
    left = [site for site in left if not trains_whole(site.path, beside)]
    sizes: dict[str, int] = {}
    for site in selection.sites:
        sizes[site.path] = sizes.get(site.path, 0) + site.shape.out_features * site.shape.in_features
    total, frozen = 0, dict[str, int]()
    for name, (path, size) in blocks.weights().items():
        done = size if name in beside else min(size, sizes.get(path, 0) if name in blocks.layers else 0)
        total += size
        if done < size:
            frozen[_pattern(name)] = frozen.get(_pattern(name), 0) + size - done
    share = 1 - sum(frozen.values()) / total if total else 1.0
    frozen = dict(sorted(frozen.items(), key=lambda item: -item[1]))
    parts.append(f"{_percent(share)} of the weights of the blocks")
    routers = {site.shape.layer: "router" for site in left if is_router(model, site.path)}
    line = ", ".join(parts) + _skipped(left, routers | selection.skipped)
    # The default, and an alias of all layers of a kind, are meant to cover the blocks.
    warned = share < 0.5 and (targets is None or not {"all", CONV}.isdisjoint(targets))
    return Coverage(line, share, frozen, _warning(blocks, share, frozen, targets) if warned else "")


def _warning(blocks: Blocks, share: float, frozen: Mapping[str, int], targets: list[str] | None) -> str:
    total = sum(frozen.values()) / (1 - share)
    tensors = {_pattern(name) for name in blocks.weights().keys() - blocks.layers}
    names = [f"{pattern} ({_percent(size / total)})" for pattern, size in list(frozen.items())[:3]]
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    hints = []
    kinds = {_pattern(f"{site.path}.weight"): site.kind for site in blocks.sites if blocks.has(site)}
    missing = {CONV if kinds[pattern] == CONV else "all" for pattern in frozen if pattern in kinds}
    if missing - set(targets or []):
        hints.append(f"Adapt more with --model.targets '[{', '.join(sorted(missing | set(targets or ['all'])))}]'.")
    if tensors & frozen.keys():
        hints.append("Tensors outside linear layers and convolutions, such as stacked experts, cannot be adapted.")
    return (
        f"only {_percent(share)} of the weights of the blocks are adapted. Frozen: {', '.join(names)}{more}. "
        + " ".join(hints)
    ).strip()


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 0.995 or share == 1 else "> 99 %"


def _pattern(name: str) -> str:
    pattern = re.sub(r"(?<![^._])\d+(?![^.])", "*", name)
    return pattern if re.search(r"\w", pattern) else name  # nn.Sequential's layers are numbers alone


def _skipped(left: list[Site], reasons: dict[str, str]) -> str:
    """Return the skipped layers with their reasons; names that differ in numbers are grouped."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in (site.shape.layer for site in left):
        groups.setdefault((_pattern(name), reasons.get(name, "")), []).append(name)
    texts = [
        (f"{len(names)} x {pattern}" if len(names) > 1 else names[0]) + (f" ({reason})" if reason else "")
        for (pattern, reason), names in groups.items()
    ]
    if len(texts) > _MOST_GROUPS:
        rest = len(left) - sum(map(len, list(groups.values())[: _MOST_GROUPS - 1]))
        texts = [*texts[: _MOST_GROUPS - 1], f"and {rest} more"]
    return f"; skipped: {', '.join(texts)}" if texts else ""
