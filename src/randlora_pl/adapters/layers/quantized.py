"""Quantised frozen layers with an update: their own forward, and the update's product beside it."""

from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters.layers.adapted import AdaptedLayer
from randlora_pl.adapters.layers.weight_access import dequantized
from randlora_pl.utils.errors import UserError


class AdaptedQuantized(AdaptedLayer):
    """``x W0 + x (W - W0)`` where W0 is packed and never touched; the first product is the layer's own.

    Adapted layers are of classes that `adapted_class` makes of this one and theirs, since a forward of a library
    calls other methods of its class.
    """

    weight_name = "weight"
    mergeable = False

    @property
    def base_weight(self) -> Tensor:
        """W0, (out, in), computed anew at each call."""
        return dequantized(self)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        output: Tensor = super().forward(x)
        if self.delta is None or not self.enabled:
            return output
        return output + self.delta.contribution(x, lambda: self.base_weight).to(output.dtype)

    def merge(self) -> None:
        """Refuses: nothing can be added to a packed weight.

        Raises:
            UserError: Always, where there is an update.
        """
        if self.delta is not None:
            raise unmergeable(self.plain_class.__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle, which finds no class that was made at run time."""
        return (_empty, (self.plain_class,), *super().__reduce_ex__(protocol)[2:])


_CLASSES: dict[type[nn.Module], type[AdaptedQuantized]] = {}


def unmergeable(name: str) -> UserError:
    """Why an update of a quantised layer is not merged, and where it can be."""
    return UserError(
        f"{name} is quantised, and nothing can be added to its weight: load the base model without quantisation, put "
        "the adapter into that, and merge there."
    )


def adapted_class(plain: type[nn.Module]) -> type[AdaptedQuantized]:
    """The class of an adapted layer of a quantised kind."""
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"Adapted{plain.__name__}", (AdaptedQuantized, plain), {"__module__": __name__})
    return _CLASSES[plain]


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = adapted_class(plain)
    return kind.__new__(kind)
