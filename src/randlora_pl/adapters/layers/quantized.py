"""Quantized frozen layers with an update: their own forward plus the update's product."""

from typing import Any

from torch import Tensor, nn

from randlora_pl.adapters.layers.adapted import AdaptedLayer
from randlora_pl.adapters.layers.weight_access import dequantized
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


_CLASSES: dict[type[nn.Module], type[AdaptedQuantized]] = {}


def adapted_class(plain: type[nn.Module]) -> type[AdaptedQuantized]:
    """Return the adapted class for a quantized layer class."""
    if plain not in _CLASSES:
        _CLASSES[plain] = type(f"Adapted{plain.__name__}", (AdaptedQuantized, plain), {"__module__": __name__})
    return _CLASSES[plain]


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = adapted_class(plain)
    return kind.__new__(kind)
