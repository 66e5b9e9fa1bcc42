"""Sum of scaled bases B S, and a linear layer with it: forward and backward at the lowest cost.

B (D, n r) contains the bases side by side, S (n r, d) the rows lambda_jk A_k gamma_j. The frozen weight W0 is (D, d),
or (d, D) if it is wider than tall. T is the number of tokens, L (T, D) is the input or the output's gradient with the
larger side, M (T, d) the other one.

- Forward: W0 + B S is built once and multiplied once. PEFT's two products with B and S cost T (D + d) n r, which is
  less for few tokens only. Next to a separate frozen product (dropout on the update's input, a quantized weight) a
  built B S needs a second product of T D d, so that two thin products are cheaper more often: see `cheapest_alone`.
- Backward: the gradient of S is ``B^T (L^T M)`` or ``(L B)^T M``, whichever takes fewer operations, and is reduced to
  the gradients of lambda and gamma at once: neither S nor a gradient of the weight's size outlives the call.
- Between the passes a layer keeps M, or L, or the smaller L B, and W0 + B S only if requested or expensive, or a small
  layer's S for a few tokens. Over several passes of one optimizer step it also keeps S or W0 + B S: see `Held`.
- Tokens with a zero gradient are left out of the backward pass. Above the last attention of a model that pools one
  token, these are all other tokens.

A layer that is used once in each optimizer step keeps nothing over several passes. The second use of the same tensors
starts keeping, and the following steps keep from their first use. Tensors are the same if they are the same objects
with the same version counters, and no optimizer has taken a step (PyTorch's fused optimizers do not count their
changes). So results have the same bits with and without the cache.

An optimizer step drops everything, and so do a change between training and evaluation, merging, and moving the module.
A change of values in place through ``.data`` is not seen before the next of these.
"""

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from randlora_pl.adapters.kernels.basis_product import Factors, Form, Stored, effective, mixed_stack, unstacked
from randlora_pl.adapters.kernels.common import enlarged, in_parts, masked, without_autocast
from randlora_pl.adapters.kernels.hadamard import Hadamard
from randlora_pl.adapters.kernels.triton_kernels import build_weight, sums
from randlora_pl.adapters.random_bases import stamp, storable
from randlora_pl.utils.device import on_cuda


class Held:
    """Tensors that a layer keeps during one step.

    Attributes:
        before: Uses in the step before.
        recomputes: True if the forward ran again in the backward pass of the step before (gradient checkpointing).
        training: True in training.
        uses: Uses in this step.
        recomputed: As ``recomputes``, in this step.
    """

    def __init__(self, before: int = 1, recomputes: bool = False, training: bool = False) -> None:
        self.before, self.recomputes, self.training = before, recomputes, training
        self.uses, self.recomputed = 0, False
        self.stamp: tuple[Any, ...] = ()
        self.sources: tuple[Any, ...] = ()
        self._made: dict[Hashable, tuple[Any, Tensor, Tensor | None]] = {}

    @property
    def active(self) -> bool:
        """True if tensors are kept: after the first use, or from the first use if the last step had several."""
        return self.uses > 1 or (self.training and self.uses == 1 and self.before > 1)

    def get(self, key: Hashable, make: Callable[[], Tensor], weight: Tensor | None = None) -> Tensor:
        """Return the tensor of a key, from ``make`` unless it is kept; with a weight, only while that is the same."""
        if not self.active or (weight is not None and weight.is_inference()):
            return make()
        stamp: tuple[Any, ...] | None = None
        if weight is not None:  # differs if the weight's values may differ, while its storage exists
            real = type(weight) in (Tensor, nn.Parameter)
            place = weight.data_ptr() if real else id(weight if weight._base is None else weight._base)
            stamp = (place, weight._version, weight.shape, weight.stride(), weight.dtype)
        kept = self._made.get(key)
        if kept is not None and kept[0] == stamp:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        if storable(made, self.sources[0]):
            # The weight's storage is kept with it: no other tensor can take its address.
            self._made[key] = (stamp, made, None if weight is None else weight.detach())
            _LIVE.add(self)
        return made

    def drop(self) -> None:
        """Drop all tensors."""
        self._made.clear()


NOTHING = Held()
"""Keeps nothing: it has no uses."""

FrozenParts = tuple[Tensor, Stored | Hadamard]
"""A (r, d) and B of a layer."""


class StepCache:
    """Tensors that a layer keeps from one step to the next; copies of a module begin with nothing."""

    def __init__(self) -> None:
        self.held = Held()
        self._frozen: tuple[tuple[Any, ...], FrozenParts, tuple[Tensor, Tensor]] | None = None

    def frozen(
        self, a: Tensor, b: Tensor, dtypes: tuple[torch.dtype, ...], make: Callable[[], FrozenParts]
    ) -> FrozenParts:
        """Return the layer's frozen parts, made again if A, B or the dtypes differ, or if a tracer records."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return make()
        key = (stamp(a, b), dtypes, on_cuda(b))
        kept = self._frozen  # one object, as other threads may replace it
        if kept is not None and kept[0] == key:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        if storable(made[0], a):
            self._frozen = key, made, (a, b)  # which are kept, so that no other tensor has their ids
        return made

    def begin(self, lambdas: Tensor, gammas: Tensor, frozen: FrozenParts, training: bool) -> Held:
        """Return what the layer keeps, at a use of its tensors; `NOTHING` while a tracer records."""
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return NOTHING
        if not (isinstance(lambdas, nn.Parameter) and isinstance(gammas, nn.Parameter)) or lambdas.is_inference():
            return NOTHING
        now = (_steps, training, lambdas.device, lambdas.dtype, id(frozen), *stamp(lambdas, gammas))
        last = self.held
        if now != last.stamp:
            last.drop()
            if training and last.training:
                self.held = Held(last.uses, last.recomputed, True)
            else:
                self.held = Held(last.before, last.recomputes, training)
            self.held.stamp, self.held.sources = now, (lambdas, gammas, frozen)
        self.held.uses += 1
        if training and torch._C._current_graph_task_id() != -1:  # in a backward pass
            self.held.recomputed = True
        return self.held

    def clear(self) -> None:
        """Drop all tensors, also the update's."""
        self.held.drop()
        self.held = Held(self.held.before, self.held.recomputes)
        self._frozen = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (StepCache, ())


_LIVE: WeakSet[Held] = WeakSet()
_steps = 0


def end_step(*_: Any) -> None:
    """Begin the next step: drop what is kept. Every step of an optimizer of PyTorch calls this."""
    global _steps
    _steps += 1
    for held in list(_LIVE):
        held.drop()
    _LIVE.clear()


register_optimizer_step_post_hook(end_step)


def held_stack(held: Held, basis: Stored | Hadamard, factors: Factors, form: Form, dtype: torch.dtype) -> Tensor:
    """Return the result of `mixed_stack`, kept over the uses of one step."""
    if not held.active:
        return mixed_stack(basis, factors, form, dtype)
    key = ("S", dtype, form.scales, basis.rows(dtype))
    return held.get(key, lambda: mixed_stack(basis, factors, form, dtype))


def held_weight(
    held: Held,
    holds: bool,
    weight: Tensor | None,
    basis: Stored | Hadamard,
    factors: Factors,
    form: Form,
    dtype: torch.dtype,
) -> Tensor:
    """Return the result of `effective`; over the uses of one step it is kept, or S without ``holds``."""

    def make() -> Tensor:
        if isinstance(basis, Stored) and sums(factors[0], weight, form.dtype, dtype):  # a kernel forms S in registers
            signs = basis.b.dtype == torch.int8 and basis.inner % 16 == 0 and form.dtype != torch.float16
            matrix = basis.matrix(torch.int8 if signs else form.dtype)
            scale = math.prod((*form.scales, *enlarged(form.dtype)))
            dithers = weight is not None and weight.dtype == torch.bfloat16
            products = form.dtype
            return build_weight(weight, matrix, *factors, scale, form.peft, form.transposed, products, dtype, dithers)
        stack = held_stack(NOTHING if holds else held, basis, factors, form, form.dtype)
        return effective(weight, basis, stack, form, dtype)

    return held.get(("built", weight is None, dtype, form), make, weight) if holds else make()


_PROBES = 13  # does not divide usual numbers of tokens, so that probes do not always hit an image's first token


class SumOfBases(torch.autograd.Function):
    """B S as a separate matrix."""

    @staticmethod
    def forward(ctx: Any, lambdas: Tensor, gammas: Tensor, a: Tensor, basis: Stored | Hadamard, form: Form) -> Tensor:
        """Build B S, (D, d) or (d, D), from lambda (n, r), gamma (n, d), A (r, d) and B."""
        ctx.save_for_backward(lambdas, gammas, a)  # a is a view of the shared tensor
        ctx.basis, ctx.form = basis, form
        with without_autocast(lambdas):
            dtype = lambdas.dtype if form.dtype == torch.float16 else form.dtype
            return held_weight(NOTHING, False, None, basis, (lambdas, gammas, a), form, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Reduce the (D, d) gradient to the gradients of lambda and gamma."""
        factors = ctx.saved_tensors
        basis, form = ctx.basis, ctx.form
        with without_autocast(factors[0]):
            gradient = gradients[0].to(form.dtype)
            stack = basis.reduce(gradient.T if form.transposed else gradient)
            stack = basis.unmixed(stack, factors[0].dtype)
            scales = (*form.scales, *enlarged(form.dtype))
            return *unstacked(stack, factors, form.peft, scales), None, None, None


class AdaptedProduct(torch.autograd.Function):
    """``x (W0 + B S)^T + bias`` for a frozen W0; ``x (B S)^T`` without; ``x W0^T + m(x) (B S)^T + bias`` with a mask.

    m sets entries to zero. The masked part is added to outputs and gradients in place, in chunks of tokens: allocating
    memory of a layer's wide side takes a tenth of the time of a product on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lambdas: Tensor,
        gammas: Tensor,
        a: Tensor,
        basis: Stored | Hadamard,
        form: Form,
        mask: Tensor | None,
        held: Held,
    ) -> Tensor:
        """Compute (..., out) from x (..., in), W0 (out, in), bias, lambda (n, r), gamma (n, d), A (r, d) and B."""
        need_x, need_sum = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:5])
        factors = lambdas, gammas, a
        output, built, mixed, projected = product(x, weight, bias, factors, basis, form, need_sum, mask, held)
        ctx.projected, ctx.alone = projected is not None, weight is None or mask is not None
        ctx.save_for_backward(
            (x if projected is None else projected) if need_sum else None,
            built if need_x else None,
            mixed if need_x else None,
            weight if need_x and (built is None or mask is not None) else None,
            mask if need_x or (need_sum and projected is None) else None,
            *factors,
        )
        ctx.basis, ctx.form, ctx.held, ctx.shape = basis, form, held, x.shape
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, bias, lambda and gamma."""
        need_x, _, need_bias, *need_sum = ctx.needs_input_grad[:5]
        trains = any(need_sum)
        kept, built, mixed, weight, mask, lambdas, gammas, a = ctx.saved_tensors
        basis, form, factors = ctx.basis, ctx.form, (lambdas, gammas, a)
        out_features, in_features = form.shape
        grad_x = grad_lambdas = grad_gammas = None
        with without_autocast(gradient):
            gradient = gradient.reshape(-1, out_features)
            kept = kept if kept is None or ctx.projected else kept.reshape(-1, in_features)
            mask = None if mask is None else mask.reshape(-1, in_features)
            tokens, rows = gradient.shape[0], nonzero_rows(gradient)
            if rows is not None:
                gradient = gradient[rows]
                kept, mask = (None if each is None else each[rows] for each in (kept, mask))
            choice = form.choose(basis, gradient.shape[0], ctx.alone, trains)
            projected = kept if ctx.projected else None
            if not form.transposed and choice.project and (trains or not choice.build):
                projected = basis.project(gradient)
            if need_x:
                if built is None:
                    parts = basis, factors, form, gradient.dtype
                    if choice.build:
                        built = held_weight(ctx.held, False, None if ctx.alone else weight, *parts)
                    elif mixed is None:
                        mixed = held_stack(ctx.held, *parts)
                plain = None
                if weight is not None and (built is None or mask is not None):
                    plain = gradient @ weight.to(gradient.dtype)
                if built is None:
                    thin = None if form.transposed else projected
                    grad_x = add_masked(plain, mask, partial(add_product, basis, mixed), gradient, thin)
                else:
                    grad_x = add_masked(plain, mask, partial(add_matmul, built), gradient)
            if trains:
                kept = kept if ctx.projected else masked(kept, mask)
                many, few = (kept, gradient) if form.transposed else (gradient, kept)
                if choice.project or projected is not None:
                    stack = basis.contract(basis.project(many) if projected is None else projected, few)
                else:
                    stack = basis.reduce((many.T @ few).to(form.dtype))
                scales = (*form.scales, *enlarged(stack.dtype))
                stack = basis.unmixed(stack, lambdas.dtype)
                grad_lambdas, grad_gammas = unstacked(stack, factors, form.peft, scales)
            grad_bias = gradient.sum(0) if need_bias else None
        if grad_x is not None:
            whole = grad_x if rows is None else grad_x.new_zeros(tokens, in_features).index_copy_(0, rows, grad_x)
            grad_x = whole.view(ctx.shape)
        return grad_x, None, grad_bias, grad_lambdas, grad_gammas, None, None, None, None, None


def nonzero_rows(gradient: Tensor) -> Tensor | None:
    """Return the indices (u) of nonzero rows if they are at most half of the rows; None for all rows.

    Only on a CPU, after probing a few rows: on a GPU the synchronization would cost more than it saves.
    """
    plain = type(gradient) is Tensor and gradient.device.type == "cpu" and not on_cuda(gradient)
    if not plain or torch.compiler.is_compiling() or gradient.shape[0] < _PROBES:
        return None
    if 2 * int(gradient[:: len(gradient) // _PROBES].any(1).sum()) > _PROBES:
        return None
    rows = gradient.any(1).nonzero()[:, 0]
    return rows if 2 * len(rows) <= len(gradient) else None


def product(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factors: Factors,
    basis: Stored | Hadamard,
    form: Form,
    train: bool,
    mask: Tensor | None,
    held: Held,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the layer's output by the cheaper form; ``train`` is True if lambda or gamma needs a gradient.

    Returns:
        The output; B S or W0 + B S, if it is kept for the backward pass; S with a W0, if it is kept instead; m(x) B,
        if training keeps it instead of x.
    """
    large, out_features = form.large, form.shape[0]
    alone = weight is None or mask is not None
    with without_autocast(x):
        tokens = x.reshape(-1, x.shape[-1])
        mask = None if mask is None else mask.reshape(tokens.shape)
        # The form stays the same within a step; on a CPU also over the steps, as another form rounds in another way.
        often = on_cuda(x) and held.before > 1 and form.holds(held.training, held.recomputes)
        uses = held.before if often and form.keeps(basis, tokens) else 1
        choice = form.choose(basis, tokens.shape[0], alone, train, uses)
        early = form.transposed and (not choice.build or (train and choice.project and basis.inner < large))
        projected = None
        if early:
            if mask is None:
                projected = basis.project(tokens)
            else:
                projected = torch.cat([basis.project(masked(tokens[part], mask[part])) for part in in_parts(tokens)])
        built = None
        if choice.build:
            base, keep = None if alone else weight, form.keeps(basis, tokens)
            holds = keep and form.holds(held.training, held.recomputes or held.recomputed)
            built = held_weight(held, holds, base, basis, factors, form, x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        plain = None
        if weight is not None and (built is None or mask is not None):
            plain = nn.functional.linear(tokens, weight.to(x.dtype), bias)
        if built is None:
            tokens = tokens if early else masked(tokens, mask)
            mixed = held_stack(held, basis, factors, form, x.dtype)
            output = add_product(basis, mixed, plain, tokens, projected)
        elif plain is None:
            output = nn.functional.linear(tokens, built, bias)
        else:
            output = add_matmul(built.T, plain, masked(tokens, mask))
    output = output.view(*x.shape[:-1], out_features)
    if built is None:
        keep = not alone and form.keep is not False and form.few(tokens.shape[0])
        return output, None, mixed if keep else None, projected if train and basis.inner < large else None
    return output, built if keep else None, None, projected


def add_product(
    basis: Stored | Hadamard, mixed: Tensor, result: Tensor | None, tokens: Tensor, projected: Tensor | None = None
) -> Tensor:
    """Compute ``tokens B S`` if ``projected`` (``tokens B``) is given, else ``tokens (B S)^T``, in two thin products.

    It is added in place to ``result`` unless that is None; ``mixed`` is the basis's `mixed` of S.
    """
    stack = mixed.flatten(0, -2)
    if projected is None:
        return basis.expand(tokens @ stack.T, result)
    return add_matmul(stack, result, projected.flatten(1))


def add_matmul(matrix: Tensor, result: Tensor | None, rows: Tensor) -> Tensor:
    """Compute ``rows @ matrix``, added in place to ``result`` unless that is None."""
    return rows @ matrix if result is None else result.addmm_(rows, matrix)


def add_masked(result: Tensor | None, mask: Tensor | None, add: Callable[..., Tensor], *rows: Tensor | None) -> Tensor:
    """Compute ``add(result, *rows)``; with a mask, in chunks, with zeros where the mask is True, in place."""
    if mask is None or result is None:
        return add(result, *rows)
    for part in in_parts(result):
        result[part] += add(None, *(None if each is None else each[part] for each in rows)).masked_fill_(mask[part], 0)
    return result
