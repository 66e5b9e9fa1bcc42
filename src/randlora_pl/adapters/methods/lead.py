"""Leading columns: the update of RandLoRA that has absorbed a LoRA.

The first term of each of the first k bases has a column u_j (D) of its own, and ones instead of the row of A:

    delta W = alpha/r * (sum_{j<=k} u_j lambda_j1 gamma_j + sum of B_jk lambda_jk A_k gamma_j over the other terms)

So a LoRA of rank k <= n is a value of lambda and gamma: with Q R = qr(B), the columns of Q and the rows of R A. Ones,
because entries of A near zero would need a huge gamma, by which the other terms of the basis would grow, too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters.base import like, plus_product
from randlora_pl.adapters.kernels.dropout import keep_scaling, masked
from randlora_pl.adapters.methods.randlora_update import RandLoRADelta
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.weights import WeightShape


class LedRandLoRADelta(RandLoRADelta):
    """Update of one weight with ``lead`` (D, k), zero until `absorb` sets it; the other terms keep their fast path."""

    kept = ("lead",)
    lead: Tensor
    others: Tensor

    def __init__(self, adapter: Any, shape: WeightShape, weight: Tensor, bases: Bases, number: int) -> None:
        super().__init__(adapter, shape, weight, bases)
        others = torch.ones_like(self.lambdas.detach())
        others[:number, 0] = 0
        self.register_buffer("others", others, persistent=False)
        self.register_buffer("lead", self.gammas.new_zeros(self.large, number))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return lambda (n, r) with zeros for the leading terms, gamma (n, d) and A (r, d)."""
        lambdas, gammas, a = super().tensors()
        return lambdas * self.others, gammas, a

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return P (out, k) and Q (k, in), whose product is the sum of the leading terms, with the scaling."""
        number = self.lead.shape[1]
        rows = self.gammas[:number] * (self.lambdas[:number, :1] * self.scaling)
        return (rows.T, self.lead.T) if self.transposed else (self.lead, rows)

    def delta(self) -> Tensor:
        """Return the whole sum, (out, in)."""
        p, q = self.factors()
        return super().delta() + p @ q

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
        output = super()._product(x, weight, bias, mask)
        p, q = self.factors()
        q = q if mask is None else q * keep_scaling(x, self.dropout)
        return plus_product(output, F.linear(masked(x, mask), like(q, x)), p)

    @torch.no_grad()
    def absorb(self, b: Tensor, a: Tensor) -> None:
        """Set the update to B A, for the scaled B (out, k) and A (k, in) of a LoRA; the other bases stay.

        All tensors have a gradient then: lambda_j1 is 1, and the other lambda of the first k bases are zero.
        """
        left, right = (a.T, b.T) if self.transposed else (b, a)
        columns, triangle = torch.linalg.qr(left.detach().to("cpu", torch.float64))
        number = len(triangle)
        self.lead.copy_(columns)
        self.lambdas[:number] = 1 - self.others[:number]
        self.gammas[:number] = (triangle @ right.detach().to(triangle) / self.scaling).to(self.gammas)
