"""What keeps an update from acting on a weight: shared, computed or hidden weights, and forwards of another kind."""

import functools
import inspect
import re
from typing import Any, NamedTuple

from torch import nn

from randlora_pl.adapters.layers.weight_access import is_conv1d, is_quantized
from randlora_pl.adapters.targets.sites import Site


class Obstacle(NamedTuple):
    """Why a weight takes no update: in a word or two for a list, and as a message."""

    short: str
    message: str


def obstacle(model: nn.Module, site: Site, owners: dict[int, list[str]]) -> Obstacle | None:
    """What keeps an update from a site; None where nothing does.

    Args:
        model: The model.
        site: One of its sites.
        owners: What `owners_of` gives for the model.
    """
    module, layer = model.get_submodule(site.path), site.shape.layer
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
                f"{layer} computes its weight (a parametrization, such as weight_norm): remove that first.",
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
    """Return True if a module is an attention layer whose forward can be taken over."""
    return type(module) is nn.MultiheadAttention and module.in_proj_weight is not None


def raw_attention(model: nn.Module) -> dict[str, str]:
    """Attention modules whose q/k/v weights no update reaches: the class by path.

    These are subclasses of ``nn.MultiheadAttention``, those with a separate weight for each input, and
    modules with a raw parameter, such as open_clip's own ``Attention``.
    """
    found = {}
    for path, module in model.named_modules():
        keys = {key for key, _ in module.named_parameters(recurse=False)}
        raw = isinstance(module, nn.MultiheadAttention) or not keys.isdisjoint({"in_proj_weight", "q_proj_weight"})
        if raw and not is_packed(module):
            found[path] = type(module).__name__
    return found


def reader_of(model: nn.Module, path: str) -> type[nn.Module] | None:
    """The class of a module above a layer that reads its weight instead of calling it; None where there is none."""
    parent = model.get_submodule(path.rpartition(".")[0])
    if is_packed(parent) or type(parent).forward is nn.TransformerEncoderLayer.forward:
        return None  # both are handled: the output projection is called, the fast path is switched off
    parts = path.split(".")
    for depth in range(len(parts) if path else 0):
        above: Any = type(model.get_submodule(".".join(parts[:depth])))
        name = re.escape(".".join(parts[depth:]))
        read = re.search(rf"\bself\.{name}\.weight\b(?!\.(?:dtype|device|shape|requires_grad))", _source(above))
        if read or (issubclass(above, nn.MultiheadAttention) and depth == len(parts) - 1):
            kind: type[nn.Module] = above
            return kind
    return None


@functools.cache
def _source(kind: Any) -> str:
    """The source of a class's methods, without those that set weights up; empty where it is not to be had."""
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
    """Every parameter's names, by its id: tied ones have several."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return owners
