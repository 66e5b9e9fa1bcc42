"""Conversion of plain layers to adapted ones, in place, with a class for each kind of layer."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.layers.adapted import (
    AdaptedAttention,
    AdaptedConv1D,
    AdaptedConv2d,
    AdaptedLayer,
    AdaptedLinear,
    ReadLinear,
)
from randlora_pl.adapters.layers.weight_access import dequantized, is_conv1d, is_quantized
from randlora_pl.adapters.targets.obstacles import reader_of
from randlora_pl.utils.errors import UserError


class AdaptedQuantized(AdaptedLayer):
    """``x W0 + x (W - W0)`` with a packed W0, which is not changed; the first product is the layer's own forward.

    `adapted_class` creates a subclass of this class and the layer's class, because a library's forward calls other
    methods of its class.
    """

    weight_name = "weight"

    @property
    def base_weight(self) -> Tensor:
        """Dequantized W0, (out, in), computed at each access."""
        return dequantized(self)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer, (..., in) to (..., out)."""
        output: Tensor = super().forward(x)
        if self.delta is None or not self.enabled:
            return output
        return output + self.delta.contribution(x, lambda: self.base_weight).to(output.dtype)

    def obstacle(self, path: str = "") -> UserError | None:
        """Return the error for merging the layer, because nothing can be added to a packed weight."""
        if self.delta is None:
            return None
        name = self.plain_class.__name__
        return UserError(
            f"{f'{path} ({name})' if path else name} is quantized, so nothing can be added to its weight. Load the "
            "base model without quantization, load the adapter into it, and merge there."
        )

    def merge(self) -> None:
        """Raise an error, because nothing can be added to a packed weight.

        Raises:
            UserError: The layer has an update.
        """
        if (problem := self.obstacle()) is not None:
            raise problem

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Support pickling, which cannot find classes created at run time."""
        return (_empty, (self.plain_class,), *super().__reduce_ex__(protocol)[2:])


@functools.cache
def adapted_class(plain: type[nn.Module]) -> type[AdaptedQuantized]:
    """Return the adapted class for a quantized layer class."""
    return type(f"Adapted{plain.__name__}", (AdaptedQuantized, plain), {"__module__": __name__})


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = adapted_class(plain)  # type: ignore[arg-type]  # a class is hashable
    return kind.__new__(kind)


def attach(model: nn.Module, updates: Mapping[str, DeltaWeight]) -> None:
    """Convert plain layers to adapted ones; `operations.detach` converts them back.

    Args:
        model: Model that contains the layers.
        updates: Update of each layer by path.
    """
    kinds: dict[str, type[AdaptedLayer]] = {}
    # Before any layer changes, because an adapted attention layer calls its output projection instead of reading it.
    for path in updates:
        layer = model.get_submodule(path)
        if isinstance(layer, nn.MultiheadAttention):
            kinds[path] = AdaptedAttention
        elif isinstance(layer, nn.Conv2d):
            kinds[path] = AdaptedConv2d
        elif is_quantized(layer):
            kinds[path] = adapted_class(type(layer))  # type: ignore[arg-type]
        elif is_conv1d(layer):
            kinds[path] = AdaptedConv1D
        else:
            kinds[path] = AdaptedLinear if reader_of(model, path) is None else ReadLinear
    for path, delta in updates.items():
        kinds[path].attach(model.get_submodule(path), delta)
        parent = model.get_submodule(path.rpartition(".")[0])
        if type(parent) is nn.MultiheadAttention:  # its plain forward reads the weight of out_proj
            AdaptedAttention.attach(parent, None)
    set_fast_paths(model, False)


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
