"""HiRA: the frozen weight times a low-rank matrix, entry by entry (Huang et al., ICLR 2025)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import (
    Adapter,
    DeltaWeight,
    Layers,
    Part,
    PeftContent,
    PeftFile,
    PeftForm,
    Rank,
    append_zeros,
    like,
)
from randlora_pl.adapters.kernels.common import added, built_again, compute_dtype
from randlora_pl.adapters.kernels.randlora_linear import without_autocast
from randlora_pl.adapters.random_bases import Bases, WeightShape, kaiming, per_layer, trainable


class HiRA(Adapter):
    """HiRA: delta = W0 o (B A), entry by entry, with trained B (out, r) and A (r, in).

    The rank of the update is up to r times the rank of W0, so that a small r is enough for full rank. The scale of the
    update is W0's, hence the large default of the learning rate. Entries of W0 that are zero stay zero.

    Examples:
        >>> inject(model, HiRA(rank=4)).trainable
        18432
    """

    rank: Rank = 32
    """Rank r of B A. A number, or numbers by pattern of layer names."""

    learning_rates = (4.5e-3, 4.5e-3, 4.5e-3)  # PEFT's benchmark, on a language model
    group = "full rank"
    reads_weight = True
    peft = PeftForm(
        "HIRA",
        frozenset({"r", "rank_pattern", "hira_dropout"}),
        ("hira_A", "hira_B"),
        kernels=("hira_A", "hira_B"),
        convolutions=True,
    )

    def count(self, shape: WeightShape) -> int:
        """Return r (out + in)."""
        return self.rank_of(shape) * (shape.out_features + shape.in_features)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "HiRADelta":
        """Create the update of one weight, with A (r, in) and B (out, r)."""
        return HiRADelta(self, shape, weight)

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert A and B: PEFT has one rank, which zeros fill up; 0.21 ignores its rank_pattern."""
        rank = max(self.rank_of(part.shape) for part in parts)
        tensors: dict[str, Tensor] = {}
        for part in parts:
            a, b = part.tensors["A"], part.tensors["B"]
            tensors[f"{part.path}.hira_A"] = append_zeros(a, rank)
            tensors[f"{part.path}.hira_B"] = torch.cat([b, b.new_zeros(len(b), rank - len(a))], dim=1)
        config = {"r": rank, "rank_pattern": {}, "hira_dropout": self.dropout}
        return config | {"exclude_modules": None, "init_weights": True}, tensors

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, None]:
        """Convert PEFT's HiRA; ranks come from the tensors."""
        ours = {layer: {name: own[f"hira_{name}"].flatten(1) for name in "AB"} for layer, own in content.layers.items()}
        ranks = per_layer({layer: len(own["A"]) for layer, own in ours.items()})
        return cls(rank=ranks, dropout=content.number("hira_dropout", 0.0)), ours, None


class HiRADelta(DeltaWeight):
    """W0 o (B A) of one weight; A is initialized Kaiming-uniform, B to zero."""

    def __init__(self, adapter: HiRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank = adapter.rank_of(shape)
        self.A = kaiming(weight, adapter.key, f"hira/{shape.layer}", rank, shape.in_features)
        self.B = trainable(weight, shape.out_features, rank, fill=0.0)

    def change(self, weight: Tensor) -> Tensor:
        """Return W0 o (B A), (out, in)."""
        return weight * (self.B @ self.A)

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply the effective weight, which the backward pass builds again; with dropout, add the update's part."""
        x = x.to(compute_dtype(x))
        if self.drops:
            plain = nn.functional.linear(x, weight, bias)
            part: Tensor = _Product.apply(self.dropped(x), weight, None, self.A, self.B, False)  # type: ignore[no-untyped-call, unused-ignore]
            return plain + part
        output: Tensor = _Product.apply(x, weight, bias, self.A, self.B, True)  # type: ignore[no-untyped-call, unused-ignore]
        return output

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return ``drop(x) @ (W0 o (B A)).T``; the backward pass asks for W0 again instead of keeping it."""
        x = self.dropped(x)
        return built_again(x, lambda: like(self.change(weight()), x), None)


class _Product(torch.autograd.Function):
    """``x (W0 + W0 o (B A))^T + bias``, or ``x (W0 o (B A))^T``; keeps x, and no matrix of the weight's size.

    Building the matrix costs r multiplications per entry, far fewer than a product with the tokens of a batch.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, whole: bool) -> Tensor:
        """Compute (..., out) from x (..., in), W0 (out, in), bias (out), A (r, in) and B (out, r)."""
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:5]) else None, weight, a, b)
        ctx.whole = whole
        with without_autocast(x):
            return nn.functional.linear(
                x, _built(weight, a, b, whole, x.dtype), None if bias is None else bias.to(x.dtype)
            )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, bias, A and B."""
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad_a = grad_b = None
        with without_autocast(gradient):
            if ctx.needs_input_grad[0]:
                grad_x = gradient @ _built(weight, a, b, ctx.whole, gradient.dtype)
            rows = gradient.reshape(-1, gradient.shape[-1])
            if x is not None:
                factor = weight * (rows.T @ x.reshape(-1, x.shape[-1])).to(a.dtype)  # gradient of B A
                grad_a, grad_b = b.T @ factor, factor @ a.T
            grad_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias, grad_a, grad_b, None


def _built(weight: Tensor, a: Tensor, b: Tensor, whole: bool, dtype: torch.dtype) -> Tensor:
    change = weight * (b @ a)
    return (added(weight, change) if whole else change).to(dtype)
