"""Reasons that a weight cannot have an update: shared, computed or hidden weights, and custom forwards."""

import functools
import inspect
import re
from contextlib import suppress
from typing import NamedTuple

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
    module, layer = model.get_submodule(site.path), site.shape.layer
    sides = site.shape.out_features, site.shape.in_features
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
