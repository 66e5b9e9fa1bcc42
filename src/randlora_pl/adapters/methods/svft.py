"""SVFT: trained entries between the singular vectors of the weight (Lingam et al., 2024, arXiv:2405.19597).

    W0 = U diag(s) V^T,    delta W = U M V^T

U (out, m) and V^T (m, in), m = min(out, in), are frozen. M (m, m) is sparse: its entries at fixed places train, all
others are zero. It starts at zero, as in the paper. The released code starts at random values, and counts one gate more
for each weight. Here W0 is added instead of built from its factors, so the pretrained model keeps its bits.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import FactoredDelta
from randlora_pl.adapters.derived import DerivedAdapter, DerivedDelta
from randlora_pl.adapters.methods.shira import distinct
from randlora_pl.adapters.random_bases import Bases, WeightShape, trainable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import NotNegative


class SVFT(DerivedAdapter):
    """SVFT: delta = U M V^T with the singular vectors of the weight and a sparse, trained M.

    Examples:
        >>> inject(model, SVFT(pattern="banded", off_diagonals=2)).trainable
        5652
    """

    pattern: Literal["plain", "banded", "random", "top_k"] = "banded"
    """Places of the trained entries of M: ``plain``, the diagonal; ``banded``, with k diagonals on each side of it;
    ``random``, as many entries as ``banded`` has, at random places; ``top_k``, as many where the left and right
    singular vectors are most alike, for square weights only."""
    off_diagonals: Annotated[int, NotNegative] = 2
    """Number k of diagonals, 0 to m - 1. With m - 1, any update of a square weight can be reached. ``plain`` does not
    use it."""

    group = "full rank"
    size_option = "off_diagonals"
    holds_factors = True

    @property
    def learning_rates(self) -> tuple[float, float, float]:  # type: ignore[override]
        """Rates of its code, lower with more than two diagonals on each side."""
        return (5e-2, 5e-2, 5e-2) if self.half_width <= 2 else (5e-3, 5e-3, 5e-3)

    @property
    def half_width(self) -> int:
        """Diagonals on each side of the main one; of other patterns, those with as many entries."""
        return 0 if self.pattern == "plain" else self.off_diagonals

    def sizes(self, shapes: Sequence[WeightShape]) -> Sequence[int]:
        """Return 0 to m - 1 for the smallest m."""
        return range(1 if self.pattern == "plain" else min(shape.small for shape in shapes))

    def count(self, shape: WeightShape) -> int:
        """Return m (2 k + 1) - k (k + 1).

        Raises:
            UserError: k is too large for this weight, or it is not square and the pattern is ``top_k``.
        """
        k, m, sizes = self.half_width, shape.small, f"{shape.out_features} x {shape.in_features}"
        if k >= m:
            raise UserError(
                f"SVFT: {k} off-diagonals are too many for {shape.layer} ({sizes}); set --model.adapter.off_diagonals "
                f"to at most {m - 1}, or leave this layer out of the targets."
            )
        if self.pattern == "top_k" and shape.out_features != shape.in_features:
            raise UserError(
                f"SVFT: top_k needs square weights, {shape.layer} is {sizes}. Set --model.adapter.pattern banded or "
                "random, or only square targets (--model.targets '[qkv, o]' with --model.adapter.qkv split)."
            )
        return m * (2 * k + 1) - k * (k + 1)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "SVFTDelta":
        """Create the update of one weight, with the trained entries of M."""
        return SVFTDelta(self, shape, weight)


class SVFTDelta(DerivedDelta, FactoredDelta):
    """U M V^T of one weight."""

    places: Tensor  # p m + q for each trained entry (p, q) of M, ascending

    def __init__(self, adapter: SVFT, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        left, _, right = self.decompose(adapter, "svd/1", shape, weight, shape.small)
        self.hold(weight, U=left, V=right)
        self.values = trainable(weight, adapter.count(shape), fill=0.0)
        stored = adapter.pattern == "top_k"  # last bits of the vectors could decide between two places
        if stored:
            self.kept, self.indexes = (*self.kept, "places"), {"places": shape.small**2}
        if weight.is_meta:
            places = torch.empty(len(self.values), dtype=torch.int32, device="meta")
        elif stored:  # where the inner products u_p v_q are largest, without their signs; of equals the first
            u, v = (self.get_buffer(name).cpu().double().T for name in ("U", "V"))
            order = (u @ v).abs().flatten().argsort(descending=True, stable=True)
            places = order[: len(self.values)].sort()[0]
        elif adapter.pattern == "random":
            places = distinct(adapter.key, f"svft/{shape.layer}", len(self.values), shape.small**2)
        else:  # at most k from the diagonal
            rows, k = torch.arange(shape.small)[:, None], adapter.half_width
            columns = rows + torch.arange(-k, k + 1)
            places = (rows * shape.small + columns)[(columns >= 0) & (columns < shape.small)]
        self.register_buffer("places", places.to(weight.device, torch.int32), persistent=stored)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return U (out, m) and M V^T (m, in), whose row p is the sum of M_pq V_q over the trained entries.

        So the gradient of M is computed at these entries only, as inner products of rows of U^T G and of V^T.
        """
        u, v = (self.get_buffer(name).to(self.values.dtype) for name in ("U", "V"))
        places, m = self.places.long(), len(v)
        first = torch.searchsorted(places, torch.arange(0, m * m, m, device=places.device))  # of each row
        return u, nn.functional.embedding_bag(places % m, v, first, mode="sum", per_sample_weights=self.values)
