"""One-line summary of adapted and skipped layers, for reports and start summaries."""

import re
from collections.abc import Collection

from torch import nn

from randlora_pl.adapters.targets.blocks import of_blocks
from randlora_pl.adapters.targets.select import Selection
from randlora_pl.adapters.targets.sites import CONV, Site, find_sites
from randlora_pl.adapters.trained import trains_whole

_MOST_GROUPS = 4


def coverage(model: nn.Module, selection: Selection, beside: Collection[str]) -> str:
    """Return the numbers of adapted linear layers and convolutions, and the skipped layers in groups.

    Args:
        model: Model, with or without the adapter.
        selection: Selected weights.
        beside: Names of fully trained tensors, whose layers do not count as skipped.
    """
    sites = [site for site in find_sites(model) if not site.block]
    adapted = {site.path for site in selection.sites}
    within = {site.path for site in of_blocks(model, sites)}
    parts, left = [], []
    for name, convolution in (("linear layers", False), ("convolutions", True)):
        mine = [site for site in sites if (site.kind == CONV) == convolution]
        if not mine:
            continue
        chosen = [site for site in mine if site.path in adapted]
        every = sum(site.path in within for site in mine)
        remarks = ["the paper's choice"] if selection.paper and not convolution else []
        remarks += [f"`{CONV if convolution else 'all'}`: {every}"] if every not in (0, len(chosen)) else []
        parts.append(f"{len(chosen)} of {len(mine)} {name}" + (f" ({'; '.join(remarks)})" if remarks else ""))
        left += [site for site in mine if site.path not in adapted] if chosen or not convolution else []
    left = [site for site in left if not trains_whole(site.path, beside)]
    return ", ".join(parts) + _skipped(left, selection.skipped)


def _skipped(left: list[Site], reasons: dict[str, str]) -> str:
    """Return the skipped layers with their reasons; names that differ in numbers are grouped."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in (site.shape.layer for site in left):
        pattern = re.sub(r"(?<![^._])\d+(?![^.])", "*", name)
        pattern = pattern if re.search(r"\w", pattern) else name  # nn.Sequential's layers are numbers alone
        groups.setdefault((pattern, reasons.get(name, "")), []).append(name)
    texts = [
        (f"{len(names)} x {pattern}" if len(names) > 1 else names[0]) + (f" ({reason})" if reason else "")
        for (pattern, reason), names in groups.items()
    ]
    if len(texts) > _MOST_GROUPS:
        rest = len(left) - sum(map(len, list(groups.values())[: _MOST_GROUPS - 1]))
        texts = [*texts[: _MOST_GROUPS - 1], f"and {rest} more"]
    return f"; skipped: {', '.join(texts)}" if texts else ""
