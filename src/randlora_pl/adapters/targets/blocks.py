"""Which layers belong to a model's repeated blocks, and which to its stem, its patch embedding or its head."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from randlora_pl.adapters.targets.sites import CONV, Site

# Parts that no default takes, wherever they are: what reads the image, and what gives classes or tokens.
_ENDS = r"\w*stem\w*|patch_embed\w*|heads?|head_dist|(?:pre_)?classifier\w*|lm_head|embed_out|[Aa]ux\w*"


def of_blocks(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Those of a model's sites that lie in its blocks, without stem, patch embedding, classifier and language head.

    Blocks are the members of lists and sequences that have layers of their own, and layers of one class beside each
    other. An attention layer that pools is one, too. In a model without blocks everything but the ends belongs here.
    """
    roots, sites = _roots(model), list(sites)
    ends = _ends(model, sites, bool(roots))

    def inside(path: str) -> bool:
        return not roots or any(path[: match.start()] in roots for match in re.finditer(r"\.", path))

    return [site for site in sites if not _below(site.path, ends) and (site.role or inside(site.path))]


def _roots(model: nn.Module) -> set[str]:
    """Paths of the blocks, and of what holds them."""
    found: set[str] = set()
    for path, module in model.named_modules():
        members = {name: child for name, child in module.named_children() if next(child.children(), None) is not None}
        kinds = Counter(type(child) for child in members.values())
        listed = isinstance(module, nn.ModuleList | nn.Sequential)
        found |= {f"{path}.{name}".lstrip(".") for name, child in members.items() if listed or kinds[type(child)] > 1}
    return found


def _ends(model: nn.Module, sites: list[Site], blocks: bool) -> set[str]:
    """Paths of the modules at both ends of the model: by name, by what the model says, and the first convolution."""
    found = {path for path, _ in model.named_modules() if re.fullmatch(_ENDS, path.rpartition(".")[2])}
    for method in ("get_classifier", "get_output_embeddings"):
        heads = _asked(model, method)
        found |= {path for path, module in model.named_modules() if path and any(module is head for head in heads)}
    convolutions = [site.path for site in sites if site.kind == CONV]
    linear = [site.path for site in sites if site.kind != CONV and not site.role]
    found |= set(convolutions[:1])
    if convolutions and not blocks:
        found |= set(linear[-1:])  # what follows the last convolution of a plain sequence, and has no name that tells
    return found


def _asked(model: nn.Module, method: str) -> tuple[object, ...]:
    """The modules that a method of timm or transformers names as the head; none where it has no answer."""
    if not callable(getattr(model, method, None)):
        return ()
    try:
        answer = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return ()
    return tuple(answer) if isinstance(answer, tuple | list) else () if answer is None else (answer,)


def _below(path: str, ends: set[str]) -> bool:
    """Return True if a module is one of the ends, or inside one."""
    return path in ends or any(path[: match.start()] in ends for match in re.finditer(r"\.", path))
