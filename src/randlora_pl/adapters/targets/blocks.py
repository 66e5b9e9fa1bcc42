"""Distinction of layers in repeated blocks from stem, patch embedding and head."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from randlora_pl.adapters.targets.sites import CONV, Site

# Modules that no default selects: stems, patch embeddings, classifiers and language heads.
_ENDS = r"\w*stem\w*|patch_embed\w*|heads?|head_dist|(?:pre_)?classifier\w*|lm_head|embed_out|[Aa]ux\w*"
_GATE, _EXPERTS = r"gate|gating|wg|\w+_gate", r"\w*experts?(?:_\d+)?"
"""Linear layer that chooses the experts of a mixture, and the modules beside it by which it is known."""


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
        self.layers: set[str] = set()
        for site in self.sites:
            packed = isinstance(model.get_submodule(site.path), nn.MultiheadAttention)
            self.layers.add(f"{site.path}.{'in_proj_weight' if packed else 'weight'}".lstrip("."))

    def has(self, site: Site) -> bool:
        """Return True if a layer is in a block and not a router of a mixture of experts."""
        return self._covers(site.path, bool(site.role)) and not is_router(self.model, site.path)

    def weights(self) -> dict[str, tuple[str, int]]:
        """Return path of the module and number of elements of each weight in the blocks, by name.

        A weight has more than one row and more than one column. Embeddings and stacked biases are not weights.
        """
        roles = {site.path for site in self.sites if site.role}
        found: dict[str, tuple[str, int]] = {}
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            for key, tensor in module.named_parameters(recurse=False):
                name = f"{path}.{key}".lstrip(".")
                matrix = sum(size > 1 for size in tensor.shape) > 1 and not key.endswith("bias")
                matrix = matrix and not isinstance(module, nn.Embedding)
                if matrix and id(tensor) not in seen and self._covers(name, path in roles):
                    seen.add(id(tensor))
                    found[name] = path, tensor.numel()
        return found

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
    for method in ("get_classifier", "get_output_embeddings"):  # of timm and transformers
        try:
            answer: object = getattr(model, method)()
        except (AttributeError, NotImplementedError):  # also of a model without the method
            continue
        heads = answer if isinstance(answer, tuple | list) else [answer]
        found |= {path for path, module in model.named_modules() if path and any(module is head for head in heads)}
    convolutions = [site.path for site in sites if site.kind == CONV]
    linear = [site.path for site in sites if site.kind != CONV and not site.role]
    found |= set(convolutions[:1])
    if convolutions and not blocks:
        found |= set(linear[-1:])  # the unnamed classifier after the last convolution of a plain sequence
    return found
