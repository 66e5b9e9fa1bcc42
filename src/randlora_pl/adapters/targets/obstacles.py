"""Reasons that a weight cannot have an update: shared, computed or hidden weights, and custom forwards."""

import functools
import inspect
import re
from typing import Any, NamedTuple

from torch import nn

from randlora_pl.adapters.layers.weight_access import is_conv1d, is_quantized
from randlora_pl.adapters.targets.sites import Site


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
    module, layer, sides = (
        model.get_submodule(site.path),
        site.shape.layer,
        (site.shape.out_features, site.shape.in_features),
    )
    if not all(sides):
        return Obstacle("no entries", f"{layer} has no entries ({sides[0]} x {sides[1]}). Leave it out of the targets.")
    if not is_packed(module):
        own = type(module)
        other = not isinstance(module, nn.Conv2d) and own.forward is not nn.Linear.forward
        if other and not is_conv1d(module) and not is_quantized(module):
            return Obstacle(
                "forward of its own", f"{layer} is a {own.__name__} with a forward of its own; an update would not act."
            )
        if "weight" not in dict(module.named_parameters(recurse=False)):
            return Obstacle(
                "computes its weight",
                f"{layer} computes its weight (a parametrization, such as weight_norm). Remove the parametrization.",
            )
        reader = reader_of(model, site.path)
        if reader is not None and (own.forward is not nn.Linear.forward or issubclass(reader, nn.MultiheadAttention)):
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


def raw_attention(model: nn.Module) -> dict[str, str]:
    """Return the attention modules whose q/k/v weights cannot have an update: class names by path.

    These are subclasses of ``nn.MultiheadAttention``, modules with separate weights per input, and modules with a raw
    parameter, such as open_clip's ``Attention``.
    """
    found = {}
    for path, module in model.named_modules():
        keys = {key for key, _ in module.named_parameters(recurse=False)}
        raw = isinstance(module, nn.MultiheadAttention) or not keys.isdisjoint({"in_proj_weight", "q_proj_weight"})
        if raw and not is_packed(module):
            found[path] = type(module).__name__
    return found


def reader_of(model: nn.Module, path: str) -> type[nn.Module] | None:
    """Return the class of a parent module that reads a layer's weight instead of calling the layer, or None."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if is_packed(parent) or type(parent).forward is nn.TransformerEncoderLayer.forward:
        return None  # handled: the output projection is called, the fast path is switched off
    parts = path.split(".")
    for depth in range(len(parts) if path else 0):
        above: Any = type(model.get_submodule(".".join(parts[:depth])))
        if _reads(above, ".".join(parts[depth:])) or (
            issubclass(above, nn.MultiheadAttention) and depth == len(parts) - 1
        ):
            kind: type[nn.Module] = above
            return kind
    return None


def _reads(kind: Any, name: str) -> bool:
    """Return True if the methods of a class read the weight of a layer with this name."""
    source, read = _source(kind), f"self.{name}.weight"
    if read not in source:  # compiling an expression for each layer takes seconds
        return False
    return re.search(rf"\b{re.escape(read)}\b(?!\.(?:dtype|device|shape|requires_grad))", source) is not None


@functools.cache
def _source(kind: Any) -> str:
    """Return the source of a class's methods, except initialization of weights; "" if it is not available."""
    own = (
        function
        for name, function in inspect.getmembers(kind, inspect.isfunction)
        if not re.search("init|reset|load|fuse|reparam", name) and getattr(nn.Module, name, None) is not function
    )
    sources = []
    for function in own:
        try:
            sources.append(inspect.getsource(function))
        except (OSError, TypeError):
            continue
    return "\n".join(sources)


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter, by id; tied parameters have several."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return owners
