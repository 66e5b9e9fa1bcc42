"""Calls of every operator on the shapes of the shipped configs, scaled down with the same remainders, and results."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from randlora_pl.adapters.kernels import triton_kernels
from randlora_pl.adapters.kernels.hadamard import block_size, copies, transform
from tests.adapters import reference


class Shape(NamedTuple):
    """n, r, D and d of a layer."""

    count: int
    rank: int
    large: int
    small: int


SHAPES = {
    "tiny": Shape(3, 1, 7, 1),
    "odd n r, odd sides": Shape(5, 7, 69, 33),
    "ViT-B/32: n r = d": Shape(8, 6, 144, 48),
    "ViT-H/14, text: n r = d + 6": Shape(7, 10, 192, 64),
    "RoBERTa-large: r above d": Shape(2, 100, 136, 34),
    "Qwen2: D cut off in a block": Shape(11, 12, 300, 128),
    "Llama-3, down: n r = d + 14": Shape(13, 6, 224, 64),
    "ViT-L/14: three blocks": Shape(24, 8, 200, 192),
}
DENSE, BLOCKS, MIXED, TERNARY = "dense", "blocks", "mixed", "ternary"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Call(NamedTuple):
    """One call of an operator and its result by the slow equation, in float64."""

    operator: Any
    args: tuple[Any, ...]
    expected: Callable[[], tuple[Tensor, ...]]

    def check(self) -> None:
        """Compare what the kernel computes."""
        actual = self.operator(*self.args)
        actual = actual if isinstance(actual, tuple) else (actual,)
        for one, other in zip(actual, self.expected(), strict=True):
            assert one.shape == other.shape, self.operator
            error = (one.double() - other).abs().max() / other.abs().max()
            assert error <= TOLERANCE[_coarsest(one, *self.args)], (self.operator, error)


def _coarsest(*values: Any) -> torch.dtype:
    kinds = {value.dtype if isinstance(value, Tensor) else value for value in values}
    return max(kinds & TOLERANCE.keys(), key=TOLERANCE.__getitem__)


def slow_stack(lambdas: Tensor, gammas: Tensor, a: Tensor, peft: bool) -> Tensor:
    """S in float64, row by row."""
    count, rank = lambdas.shape
    order = [(j, k) for k in range(rank) for j in range(count)] if peft else None
    order = order or [(j, k) for j in range(count) for k in range(rank)]
    return torch.stack([lambdas[j, k].double() * a[k].double() * gammas[j].double() for j, k in order])


def calls(shape: Shape, dtype: torch.dtype, peft: bool, only: str = "", seed: int = 0) -> Iterator[Call]:
    """Every operator once or more: products in ``dtype``, lambda, gamma and A in float32, views with strides."""
    torch.manual_seed(seed)
    if only in (DENSE, ""):
        yield from _dense(shape, dtype, peft)
    if only in (BLOCKS, MIXED, ""):
        found = _structured(shape, dtype, peft)
        yield from itertools.islice(found, 2 if only == BLOCKS else 0, 2 if only == MIXED else None)
    if only in (TERNARY, ""):
        yield from _ternary(shape, dtype)


def _factors(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    a = torch.randn(shape.rank + 2, shape.small + 3)[: shape.rank, : shape.small]
    return torch.randn(shape.count, shape.rank), torch.randn(shape.count, shape.small), a


def _dense(shape: Shape, dtype: torch.dtype, peft: bool) -> Iterator[Call]:
    large, small, columns = shape.large, shape.small, shape.count * shape.rank
    factors = lambdas, gammas, a = _factors(shape)
    s = slow_stack(*factors, peft)
    padded = torch.cat([s, s.new_zeros(-columns % 8, small)])
    yield Call(triton_kernels.form_stack, (*factors, 0.5, peft, len(padded), dtype), lambda: (0.5 * padded,))

    gradient = torch.randn(columns + 2, small).to(dtype)

    def reduced() -> tuple[Tensor, ...]:
        leaves = [each.double().requires_grad_() for each in (lambdas, gammas)]
        slow_stack(*leaves, a, peft).backward(2 * gradient[:columns].double())
        return tuple(leaf.grad for leaf in leaves)  # type: ignore[misc]

    yield Call(triton_kernels.reduce_stack, (gradient, *factors, 2.0, peft), reduced)

    weight = torch.randn(large, small).to(dtype)
    for b in (torch.randn(large, columns + 5).to(dtype), torch.randint(-1, 2, (large, columns + 1), dtype=torch.int8)):
        delta = b[:, :columns].double() @ s
        tail = (b, *factors, 1.0, peft)
        yield Call(
            triton_kernels.build_weight,
            (weight, *tail, False, dtype, dtype, False),
            lambda d=delta: (weight.double() + d,),
        )
        wide = weight.T.contiguous().float()
        yield Call(
            triton_kernels.build_weight,
            (wide, *tail, True, dtype, dtype, False),
            lambda d=delta: ((weight.double() + d).T,),
        )
    yield Call(triton_kernels.build_weight, (None, *tail, True, dtype, torch.float32, False), lambda: (delta.T,))


def _structured(shape: Shape, dtype: torch.dtype, peft: bool) -> Iterator[Call]:
    large, small, columns = shape.large, shape.small, shape.count * shape.rank
    factors = _factors(shape)
    signs = torch.randint(0, 2, (copies(large, small) * small + 3, 2), dtype=torch.int8) * 2 - 1
    block = block_size(small)
    h, o = transform(block), transform(small // block)
    # B = (blocks) (O x I) diag(t), with columns p mod d
    whole = torch.tensor(reference.hadamard(signs.tolist(), large, small, small), dtype=torch.float64)
    mixing = torch.kron(o, torch.eye(block, dtype=torch.float64)) * signs[:small, 1]
    inner = whole @ mixing.T / len(o)  # the blocks alone, (D, d), because O is orthogonal times sqrt(m)
    fold = torch.eye(small, dtype=torch.float64).repeat(1, -(-columns // small))[:, :columns]
    h, o = h.float(), o.float()
    s = slow_stack(*factors, peft)
    t, rows = signs[:, 1], signs[:, 0]
    yield Call(triton_kernels.hadamard_mix, (*factors, t, o, 1.0, peft, dtype), lambda: (mixing @ fold @ s,))
    mixed = torch.randn(small, 19).to(dtype)
    yield Call(
        triton_kernels.hadamard_unmix,
        (mixed, t, o, columns, torch.float32),
        lambda: ((mixing @ fold).T @ mixed.double(),),
    )
    tokens = torch.randn(37, large).to(dtype)
    args = (tokens, rows, h, small, False, dtype, dtype, 1.0)
    yield Call(triton_kernels.hadamard_project, args, lambda: (tokens.double() @ inner,))
    gradient = torch.randn(large, 9).to(dtype)
    args = (gradient.T, rows, h, small, True, dtype, torch.float32, 0.25)
    yield Call(triton_kernels.hadamard_project, args, lambda: (0.25 * inner.T @ gradient.double(),))
    few = torch.randn(37, small).to(dtype)
    onto = torch.randn(37, large).to(dtype)
    yield Call(
        triton_kernels.hadamard_expand,
        (few, onto, rows, h, large, 0.5, False, dtype, dtype, False),
        lambda: (onto.double() + 0.5 * few.double() @ inner.T,),
    )
    yield Call(
        triton_kernels.hadamard_expand,
        (mixed.T, None, rows, h, large, 1.0, True, dtype, torch.float32, False),
        lambda: (inner @ mixed.double(),),
    )


def _ternary(shape: Shape, dtype: torch.dtype) -> Iterator[Call]:
    b = torch.randint(-1, 2, (shape.large, shape.count * shape.rank), dtype=torch.int8)
    packed = triton_kernels.packed(b)
    for tokens in (1, 18):
        x, y = torch.randn(tokens, shape.large).to(dtype), torch.randn(tokens, b.shape[1]).to(dtype)
        yield Call(triton_kernels.ternary_project, (x, packed, b.shape[1]), lambda x=x: (x.double() @ b.double(),))
        yield Call(triton_kernels.ternary_expand, (y, packed), lambda y=y: (y.double() @ b.double().T,))
