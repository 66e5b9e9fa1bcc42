"""Distinction of layers in repeated blocks from stem, patch embedding and head."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from randlora_pl.adapters.targets.sites import CONV, Site

# Modules that no default selects: stems, patch embeddings, classifiers and language heads.
_ENDS = r"\w*stem\w*|patch_embed\w*|heads?|head_dist|(?:pre_)?classifier\w*|lm_head|embed_out|[Aa]ux\w*"


def of_blocks(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Return the sites in a model's blocks, without stem, patch embedding, classifier and language head.

    Blocks are members of lists and sequences that have child layers, and sibling layers of one class. Attention pooling
    is also a block. In a model without blocks all sites except stem and head are returned.
    """
    roots, sites = _roots(model), list(sites)
    ends = _ends(model, sites, bool(roots))

    def inside(path: str) -> bool:
        return not roots or any(path[: match.start()] in roots for match in re.finditer(r"\.", path))

    return [site for site in sites if not _below(site.path, ends) and (site.role or inside(site.path))]


def _roots(model: nn.Module) -> set[str]:
    """Return the paths of the blocks and of their parents."""
    found: set[str] = set()
    for path, module in model.named_modules():
        members = {name: child for name, child in module.named_children() if next(child.children(), None) is not None}
        kinds = Counter(type(child) for child in members.values())
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        found |= {f"{path}.{name}".lstrip(".") for name, child in members.items() if listed or kinds[type(child)] > 1}
    return found


def _ends(model: nn.Module, sites: list[Site], blocks: bool) -> set[str]:
    """Return the paths of stem and head modules: by name, by the model's methods, and the first convolution."""
    found = {path for path, _ in model.named_modules() if re.fullmatch(_ENDS, path.rpartition(".")[2])}
    for method in ("get_classifier", "get_output_embeddings"):
        heads = _asked(model, method)
        found |= {path for path, module in model.named_modules() if path and any(module is head for head in heads)}
    convolutions = [site.path for site in sites if site.kind == CONV]
    linear = [site.path for site in sites if site.kind != CONV and not site.role]
    found |= set(convolutions[:1])
    if convolutions and not blocks:
        found |= set(linear[-1:])  # the unnamed classifier after the last convolution of a plain sequence
    return found


def _asked(model: nn.Module, method: str) -> tuple[object, ...]:
    """Return the modules that a method of timm or transformers gives as the head; empty if it gives none."""
    if not callable(getattr(model, method, None)):
        return ()
    try:
        answer = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return ()
    return tuple(answer) if isinstance(answer, tuple | list) else () if answer is None else (answer,)


def _below(path: str, ends: set[str]) -> bool:
    """Return True if a module is a stem or head module, or inside one."""
    return path in ends or any(path[: match.start()] in ends for match in re.finditer(r"\.", path))
