"""KRAdapter: an update of full rank as a Khatri-Rao product of two thin matrices (Albert et al., 2025)."""

import math

import torch
from torch import Tensor

from randlora_pl.adapters.base import Adapter, DeltaWeight
from randlora_pl.adapters.random_bases import Bases, WeightShape, draw_parameter, trainable


class KRAdapter(Adapter):
    """KRAdapter: each row of the update is the outer product of a row of V and a row of U, with trained U and V.

    The shorter side of a weight has m rows, the longer one M entries; r = floor(sqrt(m)) and q = max(r, ceil(M / r)):
    ``delta[p, b r + a] = alpha V[p, b] U[p, a]``, cut to M entries, transposed if out > in (arXiv:2508.00230).

    Examples:
        >>> inject(model, KRAdapter()).trainable  # the weights give the size
        36864
    """

    alpha: float | dict[str, float] = 2.0
    """Factor of the update (official code: 2). A number, or numbers by pattern of layer names."""

    learning_rates = (1e-3, 1e-3, 1e-4)  # a first value; none is published
    proportional_to = ("U",)
    group = "full rank"

    def widths(self, shape: WeightShape) -> tuple[int, int]:
        """Return the columns r of U and q of V for one weight."""
        r = math.isqrt(shape.small)
        return r, max(r, -(-shape.large // r))

    def count(self, shape: WeightShape) -> int:
        """Return m (r + q)."""
        return shape.small * sum(self.widths(shape))

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "KRAdapterDelta":
        """Create the update of one weight, with U (m, r) and V (m, q)."""
        return KRAdapterDelta(self, shape, weight)


class KRAdapterDelta(DeltaWeight):
    """The Khatri-Rao product of one weight; U starts at zero, V Kaiming-uniform with a = 5, as in the official code."""

    uses_weight, rebuilds = False, True

    def __init__(self, adapter: KRAdapter, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        r, q = adapter.widths(shape)
        self.alpha = adapter.value("alpha", shape)
        self.large, self.transposed = shape.large, shape.out_features > shape.in_features
        self.U = trainable(weight, shape.small, r, fill=0.0)
        deviation = math.sqrt(2 / (1 + 5**2) / q)
        self.V = draw_parameter(weight, adapter.key, f"kradapter/{shape.layer}", shape.small, q, "uniform", deviation)

    def change(self, weight: Tensor) -> Tensor:
        """Return the update, (out, in).

        One multiplication makes each entry. The backward pass of the batched product takes two for each entry of the
        gradient and needs no temporary matrix.
        """
        rows = torch.bmm(self.V[:, :, None], self.U[:, None, :] * self.alpha)  # (m, q, r)
        matrix = rows.flatten(1)
        if matrix.shape[1] > self.large:
            matrix = matrix[:, : self.large]
        return matrix.T if self.transposed else matrix
