"""Repeated blocks of a backbone, which hold nearly all of its weights, and the methods that run them."""

from torch import nn

_METHODS = ("encode_image", "encode_text")  # of open_clip, beside ``forward``


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of all towers by path, in model order; nested blocks are not included.

    Blocks are the members of a list or sequence of at least two modules of one class that have child modules:
    ``visual.transformer.resblocks.0`` of open_clip, ``blocks.0`` of timm, ``encoder.layer.0`` of transformers.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        members = dict(module.named_children()) if isinstance(module, nn.ModuleList | nn.Sequential) else {}
        whole = all(  # a linear layer with an adapter has a child module
            next(member.children(), None) is not None and not isinstance(member, nn.Linear)
            for member in members.values()
        )
        if len(members) > 1 and whole and len({type(member) for member in members.values()}) == 1:
            found |= {f"{path}.{name}".lstrip("."): member for name, member in members.items()}
    # A stage of a hierarchical model looks like a block, but contains blocks itself.
    stages = {path for path in found if any(other.startswith(f"{path}.") for other in found)}
    return {path: block for path, block in found.items() if path not in stages}


def forward_methods(model: nn.Module) -> list[str]:
    """Return the names of methods that run the blocks without calling the model's ``forward``."""
    return [name for name in _METHODS if callable(getattr(model, name, None))]
