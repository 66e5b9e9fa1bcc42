"""Weighted sum of several updates of one weight."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight, like


class WeightedSum(DeltaWeight):
    """W0 + sum_i w_i (W_i - W0), where W_i is the effective weight of update i (task arithmetic).

    For additive methods this is W0 + sum_i w_i delta_i (Ilharco et al., 2023); DoRA is not additive.

    Args:
        parts: Updates of any methods; gradients reach their parameters.
        weights: Factor of each update.
    """

    def __init__(self, parts: Sequence[DeltaWeight], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts), tuple(weights)
        self.fixed = all(part.fixed for part in parts)

    def _sum(self, of: Callable[[DeltaWeight], Tensor]) -> Tensor:
        """Return the weighted sum of a tensor of each part."""
        pairs: zip[tuple[DeltaWeight, float]] = zip(self.parts, self.weights, strict=True)  # type: ignore[arg-type]
        first, *others = (of(part) if factor == 1 else factor * of(part) for part, factor in pairs)
        return sum(others, first)

    def change(self, weight: Tensor) -> Tensor:
        """Return sum_i w_i (W_i - W0), (out, in)."""
        return self._sum(lambda part: part.change(weight))

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the effective weight; if a part has active dropout or is not fixed, add each part's outputs."""
        if self.fixed and not any(isinstance(module, DeltaWeight) and module.drops for module in self.parts.modules()):
            return F.linear(x, self.effective_weight(weight), bias)
        plain = F.linear(x, weight, bias)
        return plain + like(self.contribution(x, lambda: weight), plain)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the weighted sum of the parts' contributions, (..., in) to (..., out)."""
        return self._sum(lambda part: part.contribution(x, weight))

    def apart(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor], groups: int) -> Tensor:
        """Return the weighted sum of the parts' contributions, each with its own dropout."""
        return self._sum(lambda part: part.apart(x, weight, product, groups))
