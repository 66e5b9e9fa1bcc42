"""The sum of scaled bases and the layer around it: B S built, multiplied and differentiated at the least cost.

B (D, n r) holds the bases side by side, S (n r, d) the rows lambda_jk A_k gamma_j. The frozen weight W0 is
(D, d), or (d, D) where it is wider than tall; T is the number of tokens, L (T, D) stands for whichever of the
input and the output's gradient has the larger side, M (T, d) for the other one.

- Forward, W0 + B S is built once and multiplied once. PEFT's two products through B and S cost T (D + d) n r,
  which is less for few tokens only. Beside a frozen layer of its own (dropout on the update's input, a quantised
  weight) a built B S takes a second product of T D d, and two products are less more often: see `cheapest_alone`.
- Backward, the gradient of S is ``B^T (L^T M)`` or ``(L B)^T M``, whichever takes fewer operations, and
  becomes those of lambda and gamma at once: neither S nor a gradient of the weight's size outlives the call.
- Between the two passes a layer keeps M, or L, or the smaller L B, and W0 + B S only on demand.
- Tokens whose gradient is zero are left out of the backward pass: above the last attention of a model that pools
  one token, those are all the others.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from randlora_pl.adapters.hadamard import Hadamard
from randlora_pl.adapters.operations import Choice, cheapest, cheapest_alone

_PROBES = 13  # no divisor of usual numbers of tokens, so that an image's first token is not met each time


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

    def expand(self, projected: Tensor) -> Tensor:
        """``projected @ B^T``, (T, D), for numbers (T, n r)."""
        return projected @ self.b.to(projected.dtype).T


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


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Autocast off: every product here has its dtype already."""
    kind = tensor.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


class SumOfBases(torch.autograd.Function):
    """B S as a matrix of its own."""

    @staticmethod
    def forward(ctx: Any, lambdas: Tensor, gammas: Tensor, a: Tensor, b: Tensor, form: Form) -> Tensor:
        """Args: lambda (n, r), gamma (n, d), A (r, d), B (D, n, r) or signs. Returns (D, d), or (d, D)."""
        ctx.save_for_backward(lambdas, gammas, a, b)  # a and b are views of the shared tensors
        ctx.form = form
        with without_autocast(lambdas):
            result = torch.zeros(form.shape, dtype=form.dtype, device=lambdas.device)
            return form.basis(b, lambdas).add_to(result, stacked(lambdas, gammas, a, form.peft), form.transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Reduces the (D, d) gradient to those of lambda and gamma at once."""
        lambdas, gammas, a, b = ctx.saved_tensors
        form = ctx.form
        with without_autocast(lambdas):
            gradient = gradients[0].to(form.dtype)
            basis = form.basis(b, lambdas)
            stack = basis.reduce(gradient.T if form.transposed else gradient).to(lambdas.dtype)
            return *unstacked(basis.unmixed(stack), lambdas, gammas, a, form.peft), None, None, None


def effective(weight: Tensor | None, basis: Stored | Hadamard, stack: Tensor, form: Form, dtype: torch.dtype) -> Tensor:
    """W0 + B S, or B S, in the dtype of the tokens; summed in that of W0 and with products in ``form.dtype``."""
    if weight is not None and weight.dtype == form.dtype:
        return basis.add_to(weight.clone(memory_format=torch.contiguous_format), stack, form.transposed).to(dtype)
    delta = basis.add_to(torch.zeros(form.shape, dtype=form.dtype, device=stack.device), stack, form.transposed)
    return (delta if weight is None else weight + delta.to(weight.dtype)).to(dtype)


class AdaptedProduct(torch.autograd.Function):
    """``x (W0 + B S)^T + bias`` for a frozen W0; ``x (B S)^T`` without one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lambdas: Tensor,
        gammas: Tensor,
        a: Tensor,
        b: Tensor,
        form: Form,
    ) -> Tensor:
        """Args: x (..., in), W0 (out, in), bias (out), lambda (n, r), gamma (n, d), A (r, d), B or signs."""
        need_x, need_sum = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:5])
        output, built, projected = product(x, weight, bias, lambdas, gammas, a, b, form, need_sum)
        ctx.built, ctx.projected = need_x and built is not None, projected is not None
        ctx.save_for_backward(
            (x if projected is None else projected) if need_sum else None,
            (built if ctx.built else weight) if need_x else None,
            lambdas, gammas, a, b,
        )  # fmt: skip
        ctx.form, ctx.shape, ctx.alone = form, x.shape, weight is None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias, lambda and gamma."""
        need_x, _, need_bias, *need_sum = ctx.needs_input_grad[:5]
        kept, weight, lambdas, gammas, a, b = ctx.saved_tensors
        form = ctx.form
        out_features, in_features = form.shape
        grad_x = grad_lambdas = grad_gammas = None
        with without_autocast(gradient):
            gradient = gradient.reshape(-1, out_features)
            kept = kept if kept is None or ctx.projected else kept.reshape(-1, in_features)
            tokens, rows = len(gradient), rows_that_count(gradient)
            if rows is not None:
                gradient, kept = gradient[rows], None if kept is None else kept[rows]
            basis = form.basis(b, lambdas)
            choice = form.choose(basis, len(gradient), ctx.alone, any(need_sum))
            projected = kept if ctx.projected else None
            if not form.transposed and choice.project and (any(need_sum) or not choice.build):
                projected = basis.project(gradient)
            if need_x and ctx.built:
                grad_x = gradient @ weight
            elif need_x:
                stack = stacked(lambdas, gammas, a, form.peft)
                if choice.build:
                    grad_x = gradient @ effective(weight, basis, stack, form, gradient.dtype)
                else:
                    plain = None if weight is None else weight.to(gradient.dtype)
                    grad_x = gradient.new_zeros(len(gradient), in_features) if plain is None else gradient @ plain
                    add_product(grad_x, basis, stack, gradient, None if form.transposed else projected)
            if any(need_sum):
                many, few = (kept, gradient) if form.transposed else (gradient, kept)
                if choice.project or projected is not None:
                    stack = basis.contract(basis.project(many) if projected is None else projected, few)
                else:
                    stack = basis.reduce((many.T @ few).to(form.dtype))
                stack = basis.unmixed(stack.to(lambdas.dtype))
                grad_lambdas, grad_gammas = unstacked(stack, lambdas, gammas, a, form.peft)
            grad_bias = gradient.sum(0) if need_bias else None
        if grad_x is not None:
            whole = grad_x if rows is None else grad_x.new_zeros(tokens, in_features).index_copy_(0, rows, grad_x)
            grad_x = whole.view(ctx.shape)
        return grad_x, None, grad_bias, grad_lambdas, grad_gammas, None, None, None


def rows_that_count(gradient: Tensor) -> Tensor | None:
    """Places of the rows that are not zero, (u), where they are the smaller part; None for all rows.

    Looking costs a GPU more than it would gain, since the host would wait for it; on a CPU a few rows tell first.
    """
    plain = type(gradient) is Tensor and gradient.device.type == "cpu" and not torch.compiler.is_compiling()
    if not plain or len(gradient) < _PROBES or 2 * int(gradient[:: len(gradient) // _PROBES].any(1).sum()) > _PROBES:
        return None
    rows = gradient.any(1).nonzero()[:, 0]
    return rows if 2 * len(rows) <= len(gradient) else None


class Product(NamedTuple):
    """A layer's output, W0 + B S where that is to be kept, and x B where training keeps it instead of x."""

    output: Tensor
    built: Tensor | None
    projected: Tensor | None


def product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lambdas: Tensor,
    gammas: Tensor,
    a: Tensor,
    b: Tensor,
    form: Form,
    train: bool = False,
) -> Product:
    """The layer's output by the cheaper form; ``train`` says whether lambda or gamma will need a gradient."""
    large, out_features = form.large, form.shape[0]
    with without_autocast(x):
        tokens = x.reshape(-1, x.shape[-1])
        basis = form.basis(b, lambdas)
        choice = form.choose(basis, len(tokens), weight is None, train)
        stack = stacked(lambdas, gammas, a, form.peft)
        bias = None if bias is None else bias.to(x.dtype)
        early = form.transposed and (not choice.build or (train and choice.project and basis.inner < large))
        projected = basis.project(tokens) if early else None
        if choice.build:
            built = effective(weight, basis, stack, form, x.dtype)
            output = F.linear(x, built, bias)
            return Product(output, built if form.keeps(basis, len(tokens)) else None, projected)
        if weight is None:
            output = tokens.new_zeros(len(tokens), out_features)
        else:
            output = F.linear(tokens, weight.to(x.dtype), bias)
        add_product(output, basis, stack, tokens, projected)
        output = output.view(*x.shape[:-1], out_features)
        return Product(output, None, projected if train and basis.inner < large else None)


def add_product(
    result: Tensor, basis: "Stored | Hadamard", stack: Tensor, tokens: Tensor, projected: Tensor | None
) -> None:
    """Adds ``tokens B S`` where ``tokens B`` is at hand, else ``tokens (B S)^T``, in place and in two thin products."""
    stack = basis.mixed(stack).to(tokens.dtype).reshape(basis.inner, -1)
    if projected is not None:
        result.addmm_(projected.flatten(1), stack)
    else:
        result += basis.expand(tokens @ stack.T)
