"""Updates of RandLoRA for one weight: the sum of scaled bases, and the sum of RandLoRA-a.

They take an adapter as ``Any``, because `RandLoRA` imports this module.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from randlora_pl.adapters.base import DeltaWeight, FactoredDelta, trainable
from randlora_pl.adapters.kernels.basis_product import Form, Stored
from randlora_pl.adapters.kernels.dropout import drop_mask, keep_scaling
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.kernels.randlora_linear import AdaptedProduct, SumOfBases, product
from randlora_pl.adapters.kernels.rounding import compute_dtype
from randlora_pl.adapters.kernels.step_cache import Held, StepCache
from randlora_pl.adapters.kernels.ternary import stored
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.weights import WeightShape


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
        self.scaling = adapter.of(adapter.alpha, shape, 10.0) / rank
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

    def delta(self) -> Tensor:
        """Return scale * sum_j B_j diag(lambda_j) A diag(gamma_j), (out, in)."""
        self.cache.clear()  # a layer that merges needs no more of it
        result: Tensor = SumOfBases.apply(*self.tensors(), self.basis(), self.form())  # type: ignore[no-untyped-call, unused-ignore]
        return result

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply W0 + delta in one product; the backward pass does not keep a gradient of the weight's size."""
        if torch.is_grad_enabled() and weight.requires_grad:
            return super().linear(x, weight, bias)
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
            return product(x, weight, bias, *self.tensors(), self.basis(), form, False, mask, held).output
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
