"""Updates of RandLoRA for one weight: the sum of scaled bases, the sum of RandLoRA-a, and leading columns.

They take an adapter as ``Any``, because `RandLoRA` imports this module.

An update that has absorbed a LoRA has leading columns. The first term of each of the first k bases has a column u_j (D)
of its own, and ones instead of the row of A:

    delta W = alpha/r * (sum_{j<=k} u_j lambda_j1 gamma_j + sum of B_jk lambda_jk A_k gamma_j over the other terms)

So a LoRA of rank k <= n is a value of lambda and gamma: with Q R = qr(B), the columns of Q and the rows of R A. Ones,
because entries of A near zero would need a huge gamma, by which the other terms of the basis would grow, too.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import DeltaWeight, FactoredDelta, like, plus_product
from randlora_pl.adapters.kernels.basis_product import Form, Stored, stored
from randlora_pl.adapters.kernels.common import compute_dtype, drop_mask, keep_scaling, masked
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.kernels.randlora_linear import AdaptedProduct, Held, StepCache, SumOfBases, product
from randlora_pl.adapters.random_bases import Bases, WeightShape, trainable


class _RandLoRATensors(DeltaWeight):
    """Lambda, gamma and the shared bases of one layer."""

    def __init__(self, adapter: Any, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter.dropout)
        rank, count = adapter.rank_of(shape), adapter.bases_of(shape)
        starts = {"lambda": 1 / max(count, rank), "gamma": 1 / max(count, shape.small)} | {adapter.init: 0.0}
        self.lambdas = trainable(weight, count, rank, fill=starts["lambda"])
        self.gammas = trainable(weight, count, shape.small, fill=starts["gamma"])
        self.bases = bases
        self.large, self.small, self.rank, self.count = shape.large, shape.small, rank, count
        self.transposed = shape.out_features < shape.in_features
        self.pairing = adapter.pairing
        self.scaling = adapter.value("alpha", shape) / rank
        self.structured = adapter.basis == "hadamard"
        self.keep = {"low": False, "fast": True}.get(adapter.memory)

    def scale(self) -> float:
        """Return the factor of lambda: scalings of the update and of the stored bases."""
        scaling: float = self.scaling * self.bases.scale
        return scaling

    def basis(self) -> Stored | Hadamard:
        """Return B of this layer."""
        if self.structured:
            return Hadamard(self.bases.B, self.large, self.small, self.count * self.rank, self.bases.copies)
        return stored(self.bases.B, self.large, self.count, self.rank, self.bases.copies, compute_dtype(self.lambdas))


class RandLoRADelta(_RandLoRATensors):
    """Update of equation 4 for one weight; trains ``lambdas`` (n, r) and ``gammas`` (n, d)."""

    def __init__(self, adapter: Any, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter, shape, weight, bases)
        self.cache = StepCache()

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation, and drop what the layer keeps over the uses of a step."""
        self.cache.clear()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.cache.clear()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]

    def prepare(self, dtype: torch.dtype) -> None:
        """Make the shared copies of B for products in a dtype, which a compiled program can read but not make."""
        basis = self.basis()
        if isinstance(basis, Stored):
            basis.matrix(dtype)
            return
        for piece in basis.pieces():
            basis.signed_blocks(piece, dtype)
        basis.column_signs(self.lambdas.dtype)
        basis.orthogonal(basis.blocks, self.lambdas.dtype)
        basis.orthogonal(basis.block, torch.float32)  # read by Triton's kernels

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return lambda (n, r), gamma (n, d) and A (r, d)."""
        a = self.bases.A[0, : self.rank, : self.small].to(self.lambdas.dtype)
        return self.lambdas, self.gammas, a

    def form(self, *scales: float) -> Form:
        """Return the properties of the sum besides its tensors; lambda has more factors if given."""
        dtype = compute_dtype(self.lambdas)
        scales = (self.scale(), *scales)
        return Form(dtype, self.pairing == "peft", self.large, self.small, self.transposed, self.keep, scales)

    def change(self, weight: Tensor) -> Tensor:
        """Return scale * sum_j B_j diag(lambda_j) A diag(gamma_j), (out, in)."""
        self.cache.clear()  # a layer that merges needs no more of it
        result: Tensor = SumOfBases.apply(*self.tensors(), self.basis(), self.form())  # type: ignore[no-untyped-call, unused-ignore]
        return result

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply W0 + delta in one product; the backward pass does not keep a gradient of the weight's size."""
        if torch.is_grad_enabled() and weight.requires_grad:
            return super().add(x, weight, bias)
        if self.drops:
            return self._product(x, weight, bias, drop_mask(x, self.dropout))
        return self._product(x, weight, bias)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Apply delta in one product, or in two with its bases if that takes fewer operations."""
        return self._product(self.dropped(x), None, None)

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
        x = x.to(compute_dtype(x))
        form = self.form() if mask is None else self.form(keep_scaling(x, self.dropout))
        held = Held()
        if self.keep is not False:
            held = self.cache.begin(self.lambdas, self.gammas, (self.bases.A, self.bases.B), self.training)
        if not torch.is_grad_enabled():
            return product(x, weight, bias, self.tensors(), self.basis(), form, False, mask, held)[0]
        inputs = (x, weight, bias, *self.tensors(), self.basis(), form, mask, held)
        result: Tensor = AdaptedProduct.apply(*inputs)  # type: ignore[no-untyped-call, unused-ignore]
        return result


class SummedRandLoRADelta(_RandLoRATensors, FactoredDelta):
    """RandLoRA-a of Table 2, (sum_j B_j diag(lambda_j)) (sum_j A_j diag(gamma_j)): rank r at any n."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two sums, transposed if the weight is wider than tall."""
        dtype = self.lambdas.dtype
        basis = self.basis()
        if isinstance(basis, Hadamard):
            b = basis.matrix(dtype).view(self.large, *self.lambdas.shape)
        else:
            b = self.bases.B[: self.large, : self.count, : self.rank].to(dtype)
        a = self.bases.A[: self.count, : self.rank, : self.small].to(dtype)
        left = torch.einsum("Dnr,nr->Dr", b, self.lambdas * self.scale())
        right = torch.einsum("nrd,nd->rd", a, self.gammas)
        return (right.T, left.T) if self.transposed else (left, right)


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

    def change(self, weight: Tensor) -> Tensor:
        """Return the whole sum, (out, in)."""
        p, q = self.factors()
        return super().change(weight) + p @ q

    def _product(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
        output = super()._product(x, weight, bias, mask)
        p, q = self.factors()
        q = q if mask is None else q * keep_scaling(x, self.dropout)
        return plus_product(output, nn.functional.linear(masked(x, mask), like(q, x)), p)

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
