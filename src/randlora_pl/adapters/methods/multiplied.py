"""Methods that multiply the frozen weight: HiRA and OFT.

HiRA multiplies it by a low-rank matrix, entry by entry (Huang et al., ICLR 2025). OFT rotates blocks of the layer's
inputs (Qiu et al., 2023, arXiv 2306.07280; OFTv2, 2025, arXiv 2506.19847).
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

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
from randlora_pl.adapters.kernels.common import added, built_again, compute_dtype, without_autocast
from randlora_pl.adapters.methods.lora import rates_of_factors
from randlora_pl.adapters.random_bases import Bases, WeightShape, kaiming, per_layer, trainable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Positive, at_least


class HiRA(Adapter):
    """HiRA: delta = W0 o (B A), entry by entry, with trained B (out, r) and A (r, in).

    The rank of the update is up to r times the rank of W0, so a small r is enough for full rank. The scale of the
    update is W0's, hence the large default of the learning rate. Entries of W0 that are zero stay zero.

    Examples:
        >>> inject(model, HiRA(rank=4)).trainable
        18432
    """

    rank: Rank = 32
    """Rank r of B A. A number, or numbers by pattern of layer names."""
    rate_ratio: Annotated[float, Positive] = 1.0
    """Learning rate of B divided by the one of A (LoRA+, Hayou et al., 2024), which is ``--model.learning_rate``."""

    neutral = ("rate_ratio",)
    learning_rates = (4.5e-3, 4.5e-3, 4.5e-3)  # PEFT's benchmark, on a language model
    proportional_to = ("B",)
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
        self.rates = rates_of_factors(adapter.rate_ratio)
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


_LARGEST = 32  # largest default block
_SERIES = (0, 18)  # first version of PEFT with today's series


class OFT(Adapter):
    """OFT: W = W0 R^T with a block-diagonal R = (I + Q) (I - Q)^-1 of trained skew-symmetric blocks Q (b, b).

    R is orthogonal, so W has the singular values of W0. The layer applies W0 to the rotated inputs x R.

    Examples:
        >>> inject(model, OFT(block=8)).trainable
        6720
    """

    block: Rank | None = None
    """Size b of the blocks, which divides the layer's inputs. A number, or numbers by pattern of layer names. Default:
    the largest divisor of the inputs up to 32."""
    neumann_terms: Annotated[int, at_least(4)] | None = None
    """Number of terms of a series for the inverse, from 4 on, for adapters of PEFT only. Then R is not quite
    orthogonal. Default: the exact inverse."""

    learning_rates = (1e-4, 1e-4, 1e-4)  # PEFT's benchmark, on a language model
    group = "full rank"
    size_option = "block"
    reads_weight = True
    peft = PeftForm(
        "OFT",
        frozenset(
            {
                *("r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"),
                *("module_dropout", "eps"),  # without effect outside of training and of the refused coft
            }
        ),
        ("oft_R.weight",),
        least_rank=0,  # it may be derived
    )

    def _block_of(self, shape: WeightShape) -> int:
        """Return the size of the blocks for one layer; refuse one that does not divide its inputs."""
        block, side, layer = self.value("block", shape), shape.in_features, shape.layer
        sizes = _divisors(side)
        if block in sizes:
            return int(block)
        if block is None and sizes and sizes[0] <= _LARGEST:
            return max(size for size in sizes if size <= _LARGEST)
        near = block or 0
        ends = [*[size for size in sizes if size < near][-1:], *[size for size in sizes if size > near][:1]]
        ways = f"Set block {' or '.join(map(str, ends))}" if ends else "Leave it out of the targets"
        if block is None:
            raise UserError(f"OFT: the {side} inputs of {layer} have no divisor from 2 to {_LARGEST}. {ways}.")
        raise UserError(
            f"OFT: block {block!r} does not divide the {side} inputs of {layer} into parts of 2 or more. {ways}."
        )

    def count(self, shape: WeightShape) -> int:
        """Return in (b - 1) / 2."""
        return shape.in_features * (self._block_of(shape) - 1) // 2

    def sizes(self, shapes: Sequence[WeightShape]) -> Sequence[int]:
        """Return the blocks that divide the inputs of all weights.

        Raises:
            UserError: None divides them all.
        """
        sizes = _divisors(math.gcd(*(shape.in_features for shape in shapes)))
        if not sizes:
            raise UserError(
                "OFT: no block divides the inputs of all layers. Leave out match, or set blocks by pattern."
            )
        return sizes

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "OFTDelta":
        """Create the update of one weight, with the upper triangles of Q (in / b, b (b - 1) / 2)."""
        return OFTDelta(self, shape, weight)

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert Q: PEFT has one size of the blocks, or one number of them, from which it finds each layer's.

        PEFT's OFT has the rotation R = (I + Q) (I - Q)^-1 as a series if ``use_cayley_neumann`` is set, and its inverse
        (I - Q) (I + Q)^-1 if not. So one file means two rotations, and Q is negated here for the exact form.
        """
        terms = self.neumann_terms
        number, size = _common_size({(part.shape.in_features, self._block_of(part.shape)) for part in parts})
        config = {
            "peft_version": ".".join(map(str, _SERIES)) + ".0",
            "r": number,
            "oft_block_size": size,
            "module_dropout": 0.0,
            "coft": False,
            "block_share": False,
            "use_cayley_neumann": terms is not None,
            "num_cayley_neumann_terms": terms or 5,
            "exclude_modules": None,
            "init_weights": True,
        }
        sign = -1 if terms is None else 1
        return config, {f"{part.path}.oft_R.weight": sign * part.tensors["Q"] for part in parts}

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, None]:
        """Convert PEFT's OFT; sizes of blocks come from the tensors."""
        config, terms = content.config, None  # no series, but the exact inverse
        if config.get("use_cayley_neumann", True):
            version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
            terms = config.get("num_cayley_neumann_terms", 5)
            if version is None or (int(version[1]), int(version[2])) < _SERIES or type(terms) is not int or terms < 3:
                raise UserError(
                    f"{content.source}: the series of its rotations ({terms} terms, peft_version "
                    f"{config.get('peft_version')}) has no counterpart here. Merge it with the PEFT that trained it "
                    "instead: model.merge_and_unload()"
                )
            terms = max(terms, 4)  # PEFT's sum of 3 terms is the same
        ours: Layers = {}
        blocks: dict[str, int] = {}
        for layer, own in content.layers.items():
            weight, side = own["oft_R"], content.shapes[layer].in_features
            block = (1 + math.isqrt(1 + 8 * weight.shape[-1])) // 2
            if weight.dim() != 2 or (len(weight) * block, block * (block - 1) // 2) != (side, weight.shape[1]):
                raise UserError(
                    f"{content.source}: oft_R of {layer} has shape {tuple(weight.shape)}, which does not fit its "
                    f"{side} inputs; it belongs to another model, or is damaged."
                )
            ours[layer], blocks[layer] = {"Q": -weight if terms is None else weight}, block
        return cls(block=per_layer(blocks), neumann_terms=terms), ours, None


def _divisors(side: int) -> list[int]:
    return [size for size in range(2, side + 1) if side % size == 0]


class OFTDelta(DeltaWeight):
    """W0 (R^T - I) of one weight; Q, which contains the upper triangles row by row, is initialized to zero."""

    def __init__(self, adapter: OFT, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        self.block, self.neumann_terms = adapter._block_of(shape), adapter.neumann_terms
        pairs = self.block * (self.block - 1) // 2
        self.Q = trainable(weight, shape.in_features // self.block, pairs, fill=0.0)

    def turn(self) -> Tensor:
        """Return R - I by blocks, (in / b, b, b): ``2 Q (I - Q)^-1``, exactly zero for a zero Q."""
        size, upper = self.block, self.Q.to(torch.promote_types(self.Q.dtype, torch.float32))  # solvers have no half
        rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
        filled = upper.new_zeros(size * size, len(upper)).index_copy(0, rows * size + columns, upper.T)
        filled = filled.T.reshape(-1, size, size)
        skew = filled - filled.mT
        if self.neumann_terms is None:
            one = torch.eye(size, dtype=skew.dtype, device=skew.device)
            inverted: Tensor = torch.linalg.solve(one - skew, 2 * skew, left=False)
            return inverted
        power = skew
        total = 2 * power
        for term in range(2, self.neumann_terms):
            power = power @ skew
            total = total + (2 if term < self.neumann_terms - 1 else 1) * power
        return total

    def change(self, weight: Tensor) -> Tensor:
        """Return W0 (R^T - I), (out, in)."""
        turn = self.turn()
        return _times(weight.to(turn.dtype), turn.mT)

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Turn the inputs and apply the frozen weight, or build W0 R^T if that takes fewer operations."""
        x, out_features = x.to(compute_dtype(x)), len(weight)
        tokens = x.numel() // x.shape[-1]
        built, thin = out_features, tokens  # products with R, per input and column of a block
        if self.Q.requires_grad and torch.is_grad_enabled():  # a built weight has a gradient of its size
            built, thin = (2 * self.block + tokens) * out_features, 3 * tokens * self.block
        if built < thin and self.keep is not False and not self.drops:
            return nn.functional.linear(x, self.effective_weight(weight), bias)
        return nn.functional.linear(_times(self.dropped(x), like(self.turn(), x), x), weight, bias)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return ``drop(x) (R - I) @ W0.T``; the backward pass asks for W0 again instead of keeping it."""
        turned = _times(self.dropped(x), like(self.turn(), x))
        return built_again(turned, lambda: like(weight(), turned), None)


def _times(x: Tensor, turn: Tensor, plus: Tensor | None = None) -> Tensor:
    """Return ``x (R - I)``, plus another tensor if there is one, (..., in)."""
    first, *others = (
        each.reshape(-1, *turn.shape[:2]).transpose(0, 1) for each in ((x,) if plus is None else (x, plus))
    )
    blocks = torch.baddbmm(others[0], first, turn) if others else first @ turn
    return blocks.transpose(0, 1).reshape(x.shape)


def _common_size(pairs: set[tuple[int, int]]) -> tuple[int, int]:
    """Return PEFT's number and size of blocks, of which one is 0, for inputs and blocks of layers."""
    blocks = sorted({block for _, block in pairs})
    divisors = {side: [1, *_divisors(side)] for side, _ in pairs}
    for size in (*blocks, *range(2, max(divisors) + 1)):
        if all(_nearest_divisor(divisors[side], size) == block for side, block in pairs):
            return 0, size
    if len(numbers := {side // block for side, block in pairs}) == 1:
        return numbers.pop(), 0
    raise UserError(f"its layers have blocks of {' and '.join(map(str, blocks))}; PEFT finds others for one size")


def _nearest_divisor(divisors: list[int], size: int) -> int:
    """Return the nearest divisor to a size, the smaller one of two, as PEFT does."""
    return min(divisors, key=lambda divisor: (abs(divisor - size), divisor))
