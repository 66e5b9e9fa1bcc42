"""Parts of a sum of scaled bases: B as a tensor, the form of a layer, S and its gradient, and W0 + B S.

Symbols as in `randlora_linear`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.flop_choice import Choice, cheapest, cheapest_alone
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.kernels.rounding import added


class Stored:
    """B (D, n r) as a tensor of floats or small integers, cast at each use.

    Args:
        b: B (D, n, r).
    """

    def __init__(self, b: Tensor) -> None:
        self.b = b.flatten(1)
        self.width = self.inner = self.b.shape[1]

    def add_to(self, weight: Tensor, stack: Tensor, transposed: bool) -> Tensor:
        """Add B S (D, d), or its transpose, to a weight in place; S is (n r, d)."""
        b, stack = self.b.to(weight.dtype), stack.to(weight.dtype)
        return weight.addmm_(stack.T, b.T) if transposed else weight.addmm_(b, stack)

    def project(self, tokens: Tensor) -> Tensor:
        """Return ``tokens @ B``, (T, n r), for tokens (T, D)."""
        return tokens @ self.b.to(tokens.dtype)

    def contract(self, projected: Tensor, others: Tensor) -> Tensor:
        """Return ``B^T (tokens^T others)``, (n r, d), for projected tokens and others (T, d)."""
        return projected.T @ others

    def reduce(self, gradient: Tensor) -> Tensor:
        """Return ``B^T G``, (n r, d), for G (D, d)."""
        return self.b.to(gradient.dtype).T @ gradient

    def unmixed(self, stack: Tensor) -> Tensor:
        """Return the result of `contract` or `reduce` unchanged, (n r, d)."""
        return stack

    def mixed(self, stack: Tensor) -> Tensor:
        """Return S unchanged, (n r, ...)."""
        return stack

    def expand(self, projected: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return ``projected @ B^T``, (T, D), for projected (T, n r); with ``onto``, add it in place."""
        b = self.b.to(projected.dtype).T
        return projected @ b if onto is None else onto.addmm_(projected, b)


class Form(NamedTuple):
    """Properties of a sum besides its tensors.

    Attributes:
        structured: True if ``b`` contains the signs of `Hadamard` instead of the bases.
        dtype: Dtype of the products that build B S.
        peft: True if S has PEFT's order.
        large: D.
        small: d.
        transposed: True if the weight is wider than tall.
        keep: True to keep W0 + B S for the backward pass, False to build it again, None to keep it if building is
            expensive.
    """

    structured: bool
    dtype: torch.dtype
    peft: bool
    large: int
    small: int
    transposed: bool
    keep: bool | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (out, in) of the weight."""
        return (self.small, self.large) if self.transposed else (self.large, self.small)

    def basis(self, b: Tensor, lambdas: Tensor) -> "Stored | Hadamard":
        """Return B of a layer."""
        return Hadamard(b, self.large, self.small, lambdas.numel()) if self.structured else Stored(b)

    def choose(self, basis: "Stored | Hadamard", tokens: int, alone: bool, trains: bool) -> Choice:
        """Return the cheaper form; a structured W0 + B S is always built, because that is cheap.

        Args:
            basis: B.
            tokens: T.
            alone: True without a W0 to add B S to.
            trains: True if lambda or gamma needs a gradient.
        """
        sizes = (tokens, self.large, self.small, basis.inner, basis.width)
        if alone:
            return cheapest_alone(*sizes, trains)
        choice = cheapest(*sizes)
        return Choice(True, choice.project) if self.structured else choice

    def keeps(self, basis: "Stored | Hadamard", tokens: int) -> bool:
        """Return True if W0 + B S is kept; with None, if building it again adds a twentieth to the layer's products."""
        return not self.structured and 20 * basis.width > 3 * tokens if self.keep is None else self.keep


def stacked(lambdas: Tensor, gammas: Tensor, a: Tensor, peft: bool) -> Tensor:
    """Return S, (n r, d), from lambda (n, r), gamma (n, d) and A (r, d).

    Row p = j r + k, which is multiplied by column p of B, is lambda_jk A_k gamma_j in the equation. PEFT and the
    official code have the same products in the order (k, j).
    """
    if peft:
        return (lambdas.T[:, :, None] * a[:, None]).mul_(gammas).flatten(0, 1)
    return (lambdas[:, :, None] * a).mul_(gammas[:, None]).flatten(0, 1)


def unstacked(gradient: Tensor, lambdas: Tensor, gammas: Tensor, a: Tensor, peft: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of lambda (n, r) and gamma (n, d) from the gradient of S, (n r, d), which is overwritten."""
    count, rank = lambdas.shape
    gradient = gradient.view(rank, count, -1).transpose(0, 1) if peft else gradient.view(count, rank, -1)
    gradient = gradient.mul_(a)  # (n, r, d)
    return torch.bmm(gradient, gammas[:, :, None])[:, :, 0], torch.bmm(lambdas[:, None], gradient)[:, 0]


def effective(weight: Tensor | None, basis: Stored | Hadamard, stack: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """Return W0 + B S, or B S, in ``dtype``, with products in ``form.dtype``; a bfloat16 sum loses nothing: `added`."""
    if weight is not None and weight.dtype == form.dtype and weight.dtype != torch.bfloat16:
        return basis.add_to(weight.clone(memory_format=torch.contiguous_format), stack, form.transposed).to(dtype)
    delta = basis.add_to(torch.zeros(form.shape, dtype=form.dtype, device=stack.device), stack, form.transposed)
    return (delta if weight is None else added(weight, delta)).to(dtype)
