"""The parts of a sum of scaled bases: B as a tensor, what is known of a layer, S and its gradient, and W0 + B S.

The letters are those of `sums`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from randlora_pl.adapters.kernels.flop_choice import Choice, cheapest, cheapest_alone
from randlora_pl.adapters.kernels.hadamard import Hadamard


class Stored:
    """B (D, n r) as a tensor, float or small integers, cast for each use."""

    def __init__(self, b: Tensor) -> None:
        """Args: B (D, n, r)."""
        self.b = b.flatten(1)
        self.width = self.inner = self.b.shape[1]

    def add_to(self, weight: Tensor, stack: Tensor, transposed: bool) -> Tensor:
        """Adds B S (D, d), or its transpose, to a weight in place; S is (n r, d)."""
        b, stack = self.b.to(weight.dtype), stack.to(weight.dtype)
        return weight.addmm_(stack.T, b.T) if transposed else weight.addmm_(b, stack)

    def project(self, tokens: Tensor) -> Tensor:
        """``tokens @ B``, (T, n r), for tokens (T, D)."""
        return tokens @ self.b.to(tokens.dtype)

    def contract(self, projected: Tensor, others: Tensor) -> Tensor:
        """``B^T (tokens^T others)``, (n r, d), for projected tokens and others (T, d)."""
        return projected.T @ others

    def reduce(self, gradient: Tensor) -> Tensor:
        """``B^T G``, (n r, d), for G (D, d)."""
        return self.b.to(gradient.dtype).T @ gradient

    def unmixed(self, stack: Tensor) -> Tensor:
        """What `contract` and `reduce` gave, as (n r, d)."""
        return stack

    def mixed(self, stack: Tensor) -> Tensor:
        """What `project` and `expand` leave to S, (n r, ...)."""
        return stack

    def expand(self, projected: Tensor, onto: Tensor | None = None) -> Tensor:
        """``projected @ B^T``, (T, D), for numbers (T, n r); added in place to a tensor that is given."""
        b = self.b.to(projected.dtype).T
        return projected @ b if onto is None else onto.addmm_(projected, b)


class Form(NamedTuple):
    """What a sum is besides its tensors.

    Attributes:
        structured: Whether ``b`` holds the signs of `Hadamard` and not the bases.
        dtype: Of the products that build B S.
        peft: Whether S has the order of PEFT.
        large: D.
        small: d.
        transposed: Whether the weight is wider than tall.
        keep: Whether W0 + B S is kept for the backward pass instead of built again; None where that is dear.
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
        """(out, in)."""
        return (self.small, self.large) if self.transposed else (self.large, self.small)

    def basis(self, b: Tensor, lambdas: Tensor) -> "Stored | Hadamard":
        """B of a layer."""
        return Hadamard(b, self.large, self.small, lambdas.numel()) if self.structured else Stored(b)

    def choose(self, basis: "Stored | Hadamard", tokens: int, alone: bool, trains: bool) -> Choice:
        """The cheaper forms; a structured W0 + B S is built in any case, as that adds next to nothing to W0.

        Args:
            basis: B.
            tokens: T.
            alone: Whether there is no W0 to add B S to.
            trains: Whether lambda or gamma needs a gradient.
        """
        sizes = (tokens, self.large, self.small, basis.inner, basis.width)
        if alone:
            return cheapest_alone(*sizes, trains)
        choice = cheapest(*sizes)
        return Choice(True, choice.project) if self.structured else choice

    def keeps(self, basis: "Stored | Hadamard", tokens: int) -> bool:
        """Whether W0 + B S is kept: None means where building it again adds a twentieth to the layer's products."""
        return not self.structured and 20 * basis.width > 3 * tokens if self.keep is None else self.keep


def stacked(lambdas: Tensor, gammas: Tensor, a: Tensor, peft: bool) -> Tensor:
    """S, (n r, d), from lambda (n, r), gamma (n, d) and A (r, d).

    Row p meets column p = j r + k of B. The equation puts lambda_jk A_k gamma_j there; PEFT and the official
    code put the same products in the order (k, j).
    """
    if peft:
        return (lambdas.T[:, :, None] * a[:, None]).mul_(gammas).flatten(0, 1)
    return (lambdas[:, :, None] * a).mul_(gammas[:, None]).flatten(0, 1)


def unstacked(gradient: Tensor, lambdas: Tensor, gammas: Tensor, a: Tensor, peft: bool) -> tuple[Tensor, Tensor]:
    """The gradients of lambda (n, r) and gamma (n, d) from that of S, (n r, d), which is overwritten."""
    count, rank = lambdas.shape
    gradient = gradient.view(rank, count, -1).transpose(0, 1) if peft else gradient.view(count, rank, -1)
    gradient = gradient.mul_(a)  # (n, r, d)
    return torch.bmm(gradient, gammas[:, :, None])[:, :, 0], torch.bmm(lambdas[:, None], gradient)[:, 0]


def effective(weight: Tensor | None, basis: Stored | Hadamard, stack: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """W0 + B S, or B S, in the dtype of the tokens; summed in that of W0 and with products in ``form.dtype``."""
    if weight is not None and weight.dtype == form.dtype:
        return basis.add_to(weight.clone(memory_format=torch.contiguous_format), stack, form.transposed).to(dtype)
    delta = basis.add_to(torch.zeros(form.shape, dtype=form.dtype, device=stack.device), stack, form.transposed)
    return (delta if weight is None else weight + delta.to(weight.dtype)).to(dtype)
