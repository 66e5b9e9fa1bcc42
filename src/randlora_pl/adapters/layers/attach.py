"""Conversion of plain layers to adapted ones, in place, with the class for each kind of layer."""

from collections.abc import Mapping

from torch import nn

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.layers.adapted import AdaptedAttention, AdaptedConv1D, AdaptedLayer, AdaptedLinear
from randlora_pl.adapters.layers.built import AdaptedConv2d, ReadLinear
from randlora_pl.adapters.layers.quantized import adapted_class
from randlora_pl.adapters.layers.weight_access import is_conv1d, is_quantized
from randlora_pl.adapters.targets.obstacles import reader_of


def attach(model: nn.Module, updates: Mapping[str, DeltaWeight]) -> None:
    """Convert plain layers to adapted ones; `operations.detach` converts them back.

    Args:
        model: Model that contains the layers.
        updates: Update of each layer by path.
    """
    layers = {path: model.get_submodule(path) for path in updates}
    # Before any layer changes, because an adapted attention layer calls its output projection instead of reading it.
    kinds = {path: _adapted_kind(layer, reader_of(model, path) is not None) for path, layer in layers.items()}
    for path, delta in updates.items():
        kinds[path].attach(layers[path], delta)
        parent = model.get_submodule(path.rpartition(".")[0])
        if type(parent) is nn.MultiheadAttention:  # its plain forward reads the weight of out_proj
            AdaptedAttention.attach(parent, None)
    set_fast_paths(model, False)


def _adapted_kind(layer: nn.Module, read: bool) -> type[AdaptedLayer]:
    """Return the adapted class for a layer; ``read`` is True if a parent module reads its weight."""
    if isinstance(layer, nn.MultiheadAttention):
        return AdaptedAttention
    if isinstance(layer, nn.Conv2d):
        return AdaptedConv2d
    if is_quantized(layer):
        return adapted_class(type(layer))
    if is_conv1d(layer):
        return AdaptedConv1D
    return ReadLinear if read else AdaptedLinear


def set_fast_paths(model: nn.Module, on: bool) -> None:
    """Switch PyTorch's fused inference of transformer encoders off, or on again, for modules with adapted layers.

    The fused path reads the weights directly and would ignore every update.
    """
    attributes = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for module in model.modules():
        for kind, name in attributes.items():
            if not isinstance(module, kind) or not hasattr(module, name):
                continue
            if on and hasattr(module, f"plain_{name}"):
                setattr(module, name, getattr(module, f"plain_{name}"))
                delattr(module, f"plain_{name}")
            elif not on and any(isinstance(child, AdaptedLayer) for child in module.modules()):
                setattr(module, f"plain_{name}", getattr(module, name))
                setattr(module, name, 0)
