"""A weighted sum of several updates of one weight."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight, like


class WeightedSum(DeltaWeight):
    """W0 + sum_i w_i (W_i - W0), where W_i is the effective weight that update i gives (task arithmetic).

    For methods that add this is W0 + sum_i w_i delta_i (Ilharco et al., 2023); DoRA does more than add.

    Args:
        parts: The updates, of any methods; they keep their parameters, so that gradients reach them.
        weights: The factor of each.
    """

    def __init__(self, parts: Sequence[DeltaWeight], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), tuple(weights)

    def _pairs(self) -> list[tuple[DeltaWeight, float]]:
        return list(zip(self.parts, self.weights, strict=True))  # type: ignore[arg-type]

    def delta(self) -> Tensor:
        """The sum of the parts' own updates, (out, in)."""
        first, *others = (weight * part.delta() for part, weight in self._pairs())
        return sum(others, first)

    def change(self, weight: Tensor) -> Tensor:
        """sum_i w_i (W_i - W0), (out, in)."""
        first, *others = (factor * part.change(weight) for part, factor in self._pairs())
        return sum(others, first)

    def effective_weight(self, weight: Tensor) -> Tensor:
        """W0 + sum_i w_i (W_i - W0), (out, in)."""
        return weight + self.change(weight).to(weight.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One product with the effective weight; where a part drops inputs, one product more for each part."""
        if not any(isinstance(module, DeltaWeight) and module.drops for module in self.parts.modules()):
            return F.linear(x, self.effective_weight(weight), bias)
        plain = F.linear(x, weight, bias)
        return plain + like(self.contribution(x, lambda: weight), plain)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """sum_i w_i of what part i adds, (..., in) to (..., out)."""
        first, *others = (factor * part.contribution(x, weight) for part, factor in self._pairs())
        return sum(others, first)

    def apart(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """sum_i w_i of what part i adds, each with inputs dropped by itself."""
        first, *others = (factor * part.apart(x, weight, product) for part, factor in self._pairs())
        return sum(others, first)
