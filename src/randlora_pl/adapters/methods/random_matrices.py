"""Methods on frozen random matrices: VeRA, NoLA and PRANC.

VeRA trains vectors that scale one pair of factors (Kopiczko et al., 2024). NoLA trains a combination of many
(Koohpayegani et al., 2024). PRANC trains a combination of k whole matrices (Nooralinejad et al., 2023,
arXiv:2206.08464), here as an adapter:

    delta W = alpha_scale / sqrt(k) * sum_i alpha_i R_i

The R_i are frozen and have entries of unit variance; only the coefficients alpha (k) of each weight train.

- ``dense``: the R_i consist of signs. A step draws k signs for each entry of the weight, twice, and never stores
  the matrices. An entry of R_i is one bit of a Philox word: a pure function of (seed, i, row, column). So they are the
  same in the forward and the backward pass, however the loops are divided. In the official code they differ if the two
  passes divide the coefficients in different ways, because the numbers of CUDA's generator depend on the chunk.
- ``shared``: each entry of the weight belongs to one coefficient, with a random sign, as in the official code's
  compressed form and in Uni-LoRA. Over each k consecutive entries, in row-major order, the coefficients are a random
  permutation. So each has floor or ceil(out in / k) entries in every layer, and R_i has entries of sqrt(k) there. The
  R_i are orthogonal in exact arithmetic. This is not the dense matrix of the paper.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import (
    UNLIMITED,
    Adapter,
    DeltaWeight,
    FactoredDelta,
    Layers,
    Part,
    PeftContent,
    PeftFile,
    PeftForm,
    Rank,
    append_zeros,
    like,
)
from randlora_pl.adapters.kernels.common import without_autocast
from randlora_pl.adapters.random_bases import Bases, WeightShape, draw_peft_vera, random_pair, sides, trainable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count
from randlora_pl.utils.rng import philox, stream


class VeRA(Adapter):
    """VeRA: delta = scaling * diag(b) B diag(d) A with frozen, shared A and B, and trained vectors b and d.

    Examples:
        >>> inject(model, VeRA(rank=256)).trainable
        7296
    """

    rank: Rank = 256
    """Rank r of the random pair; may exceed the layer's sides. A number, or numbers by pattern of layer names."""
    alpha: float | dict[str, float] = 1.0
    """The update is scaled by alpha / r (Table 8: 1 / r; the official code at the time of the paper: 10 / r). A number,
    or numbers by pattern, as ``rank``."""
    d_initial: float = 0.1
    """Initial value of d; b starts at zero."""

    learning_rates = (1e-2, 1e-2, 1e-2)  # Table 8
    proportional_to = ("b",)

    peft = PeftForm(
        "VERA",
        frozenset({"r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection"}),
        ("vera_lambda_b", "vera_lambda_d"),
        shared=("vera_A", "vera_B"),
    )

    def largest_rank(self, shape: WeightShape) -> int:
        """Return the largest rank, which has practically no limit."""
        return UNLIMITED

    def rank_of(self, shape: WeightShape) -> int:
        """Return the rank for one layer; none is too large."""
        return int(self.value("rank", shape))

    def count(self, shape: WeightShape) -> int:
        """Return out + r."""
        return shape.out_features + self.rank_of(shape)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases:
        """Generate A (r, in) and B (out, r) at the largest sizes of the model, entries of unit standard deviation."""
        return random_pair(self.key, 1, shapes, max(map(self.rank_of, shapes)), device)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "VeRADelta":
        """Create the update of one weight, with b (out) and d (r)."""
        assert bases is not None
        return VeRADelta(self, shape, weight, bases)

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert b and d: PEFT has one rank, lowered per layer by zeros in d, and no scaling, which b takes."""
        shapes = [part.shape for part in parts]
        rank, (rows, columns) = max(self.rank_of(shape) for shape in shapes), sides(shapes)
        bases = bases or self.bases(shapes, torch.device("cpu"))
        tensors = {"vera_A": bases.A[0, :rank, :columns], "vera_B": bases.B[:rows, 0, :rank]}
        for part in parts:
            tensors[f"{part.path}.vera_lambda_b"] = part.tensors["b"] * self.scaling_of(part.shape)
            tensors[f"{part.path}.vera_lambda_d"] = append_zeros(part.tensors["d"], rank)
        config = {
            "r": rank,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "projection_prng_key": self.key,
            "save_projection": True,
            "init_weights": True,
        }
        return config, tensors

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, Bases]:
        """Convert PEFT's VeRA, which has no scaling."""
        rank, key = int(content.config["r"]), content.number("projection_prng_key", 0)
        ours = {layer: {"b": own["vera_lambda_b"], "d": own["vera_lambda_d"]} for layer, own in content.layers.items()}
        pair = content.shared or draw_peft_vera(key, rank, list(content.shapes.values()))
        a, b = (tensor.float() for tensor in pair)
        adapter = cls(
            rank=rank,
            alpha=float(rank),
            d_initial=content.number("d_initial", 0.1),
            dropout=content.number("vera_dropout", 0.0),
            seed=key,
        )
        return adapter, ours, Bases(key, a[None], b[None], stored=True)


class VeRADelta(FactoredDelta):
    """scaling * diag(b) B diag(d) A of one weight."""

    def __init__(self, adapter: VeRA, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter.dropout)
        self.rank = adapter.rank_of(shape)
        self.scaling = adapter.scaling_of(shape)
        self.b = trainable(weight, shape.out_features, fill=0.0)
        self.d = trainable(weight, self.rank, fill=adapter.d_initial)
        self.bases = bases
        self.out_features, self.in_features = shape.out_features, shape.in_features

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scaled diag(b) B, (out, r), and diag(d) A, (r, in)."""
        b = self.bases.B[: self.out_features, 0, : self.rank].to(self.b.dtype)
        a = self.bases.A[0, : self.rank, : self.in_features].to(self.b.dtype)
        return (self.b * self.scaling)[:, None] * b, self.d[:, None] * a

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Scale tokens instead of A and B, which are frozen and need no gradient, or build W0 + P Q if cheaper."""
        tokens, out_and_in = x.numel() // x.shape[-1], sum(weight.shape)
        built = (tokens + 3 * self.rank) * weight.numel()
        if self.keep is not False and not self.drops and built < 2 * tokens * self.rank * out_and_in:
            return super().add(x, weight, bias)
        up, scale = self._thin(x)
        return torch.addcmul(nn.functional.linear(x, weight, bias), up, scale)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the two thin products, (..., in) to (..., out)."""
        up, scale = self._thin(x)
        return up * scale

    def _thin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``drop(x) A^T diag(d) B^T``, (..., out), and b with the scaling, (out)."""
        a = self.bases.A[0, : self.rank, : self.in_features]
        b = self.bases.B[: self.out_features, 0, : self.rank]
        hidden = nn.functional.linear(self.dropped(x), like(a, x))
        up = nn.functional.linear(hidden * like(self.d, hidden), like(b, hidden))
        return up, like(self.b * self.scaling, up)


class NoLA(Adapter):
    """NoLA: delta = scaling * (sum_i beta_i B_i) (sum_i alpha_i A_i), with 2 n trainable parameters per weight.

    Examples:
        >>> inject(model, NoLA(num_bases=64)).trainable
        2304
    """

    rank: Rank = 1
    """Rank r of the random factors (Table 8: 1). A number, or numbers by pattern of layer names."""
    num_bases: Count = 1024
    """Number n of random factors on each side (Table 8: 1024)."""
    alpha: float | dict[str, float] = 1.0
    """The update is scaled by alpha / r (Table 8: 1 / r). A number, or numbers by pattern, as ``rank``."""
    init: Literal["zero", "official"] = "zero"
    """``zero`` starts one coefficient vector at 1/n and the other at zero, which leaves the model unchanged at first;
    ``official`` starts both at 1/n, as the official RandLoRA code."""

    learning_rates = (1e-3, 1e-3, 1e-4)  # Table 8
    proportional_to = ("betas",)
    size_option = "num_bases"

    def count(self, shape: WeightShape) -> int:
        """Return 2 n."""
        return 2 * self.num_bases

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases:
        """Generate n factors A_i (r, in) and B_i (out, r) at the largest sizes, entries of unit standard deviation."""
        return random_pair(self.key, self.num_bases, shapes, max(map(self.rank_of, shapes)), device)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "NoLADelta":
        """Create the update of one weight, with coefficients alpha (n) and beta (n)."""
        assert bases is not None
        return NoLADelta(self, shape, weight, bases)


class NoLADelta(FactoredDelta):
    """scaling * (sum_i beta_i B_i) (sum_i alpha_i A_i) of one weight."""

    def __init__(self, adapter: NoLA, shape: WeightShape, weight: Tensor, bases: Bases) -> None:
        super().__init__(adapter.dropout)
        self.rank = adapter.rank_of(shape)
        self.scaling = adapter.scaling_of(shape)
        start = 1 / adapter.num_bases
        self.alphas = trainable(weight, adapter.num_bases, fill=start)
        self.betas = trainable(weight, adapter.num_bases, fill=start if adapter.init == "official" else 0.0)
        self.bases = bases
        self.out_features, self.in_features = shape.out_features, shape.in_features

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two combinations, (out, r) and (r, in); the first includes the scaling."""
        b = self.bases.B[: self.out_features, :, : self.rank].to(self.betas.dtype)
        a = self.bases.A[:, : self.rank, : self.in_features].to(self.alphas.dtype)
        return torch.einsum("onr,n->or", b, self.betas * self.scaling), torch.einsum("nri,n->ri", a, self.alphas)


CHUNK = 1 << 20
"""Signs at once: limits the int64 temporaries to about 30 MB. Any value gives the same signs."""

_BITS = 32
_SIGNS = stream("signs of PRANC")  # here, because a compiler cannot trace the hash


def grid_words(seed: int, name: int, numbers: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Return one word of the stream ``name`` for each number, row and column, (numbers, rows, columns), int64."""
    block = torch.arange(-(-columns // 4), device=rows.device)  # one Philox call gives four adjacent columns
    name_word = torch.tensor(name, device=rows.device)
    lanes = philox(seed, (block, rows[:, None], numbers[:, None, None], name_word))
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :columns]


def signs(seed: int, numbers: Tensor, rows: Tensor, columns: int) -> Tensor:
    """Return the entries of R_i for some numbers i and rows: +1 or -1, (len(numbers), len(rows), columns), int64."""
    words = grid_words(seed, _SIGNS, numbers, rows, -(-columns // _BITS))
    bits = (words[..., None] >> torch.arange(_BITS, device=rows.device)) & 1
    return bits.flatten(-2)[..., :columns] * 2 - 1


class SignSum(torch.autograd.Function):
    """``sum_i a_i R_i`` (out, in) of coefficients a (k); each pass draws all k signs of an entry."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, seed: int, out_features: int, in_features: int) -> Tensor:
        """Build the sum, in chunks of signs."""
        ctx.seed, ctx.sizes, ctx.like = seed, (len(a), out_features, in_features), a
        result = a.new_zeros(out_features, in_features)
        with without_autocast(a):
            for some, rows, chunk in _chunks(a, seed, *ctx.sizes):
                result[rows] += (a[some] @ chunk.flatten(1)).view(-1, in_features)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the inner products <R_i, G>, (k)."""
        gradient = gradients[0].to(ctx.like.dtype)
        result = torch.zeros_like(ctx.like)
        with without_autocast(gradient):
            for some, rows, chunk in _chunks(gradient, ctx.seed, *ctx.sizes):
                result[some] += chunk.flatten(1) @ gradient[rows].flatten()
        return result, None, None, None


def _chunks(like: Tensor, seed: int, count: int, rows: int, columns: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield ranges of numbers and of rows with their signs, at most `CHUNK` or one row, in the dtype of a tensor."""
    height = min(rows, max(1, CHUNK // columns))
    depth = max(1, CHUNK // (height * columns))
    for top in range(0, rows, height):
        row = torch.arange(top, min(top + height, rows), device=like.device)
        for first in range(0, count, depth):
            number = torch.arange(first, min(first + depth, count), device=like.device)
            ranges = slice(first, first + len(number)), slice(top, top + len(row))
            yield *ranges, signs(seed, number, row, columns).to(like.dtype)


class PRANC(Adapter):
    """PRANC: delta = alpha_scale / sqrt(k) * sum_i alpha_i R_i, with k trainable parameters per weight.

    Examples:
        >>> inject(model, PRANC(coefficients=500)).trainable
        9000
    """

    coefficients: Count = 10_000
    """Number k of random matrices and of trained coefficients per weight (the paper: 10,000 for a ResNet-20)."""
    form: Literal["shared", "dense"] = "shared"
    """``shared``: each entry of a weight belongs to one coefficient, so a step costs one addition per entry. ``dense``:
    the matrices of the paper, of signs, drawn in both passes of each step; k times as expensive, for tiny models or few
    coefficients."""
    alpha_scale: float = 1.0
    """The update is scaled by alpha_scale / sqrt(k), which makes its entries about as large as the coefficients at
    every k."""

    learning_rates = (1e-3, 1e-3, 1e-4)  # its code, from scratch
    proportional_to = ("alphas",)
    group = "full rank"
    size_option = "coefficients"

    def count(self, shape: WeightShape) -> int:
        """Return k.

        Raises:
            UserError: The weight has fewer than k entries.
        """
        if self.coefficients > (most := shape.out_features * shape.in_features):
            raise UserError(
                f"PRANC: {self.coefficients} coefficients are more than the {most} entries of {shape.layer}; set "
                "--model.adapter.coefficients to fewer, or leave this layer out of the targets."
            )
        return self.coefficients

    def sizes(self, shapes: Sequence[WeightShape]) -> Sequence[int]:
        """Return the numbers that the smallest weight allows."""
        return range(1, min(shape.out_features * shape.in_features for shape in shapes) + 1)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """Draw the coefficient and sign of each entry of the largest weight, for the form ``shared``."""
        if self.form == "dense":
            return None
        size = max(shape.out_features * shape.in_features for shape in shapes)
        places = signed_places(self.key, self.coefficients, size, device)
        return Bases(self.key, torch.empty(0, 0, 0, device=device), places.view(1, -1, 1))

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "PRANCDelta":
        """Create the update of one weight, with alpha (k), which starts at zero."""
        return PRANCDelta(self, shape, weight, bases)


class PRANCDelta(DeltaWeight):
    """alpha_scale / sqrt(k) * sum_i alpha_i R_i of one weight."""

    uses_weight = False

    def __init__(self, adapter: PRANC, shape: WeightShape, weight: Tensor, bases: Bases | None) -> None:
        super().__init__(adapter.dropout)
        self.alphas = trainable(weight, adapter.coefficients, fill=0.0)
        self.bases, self.seed, self.alpha_scale = bases, adapter.key, adapter.alpha_scale
        self.out_features, self.in_features = shape.out_features, shape.in_features

    def change(self, weight: Tensor) -> Tensor:
        """Return the combination, (out, in)."""
        sizes = self.out_features, self.in_features
        if self.bases is None:
            scaled = self.alphas * (self.alpha_scale / math.sqrt(len(self.alphas)))
            result: Tensor = SignSum.apply(scaled, self.seed, *sizes)  # type: ignore[no-untyped-call, unused-ignore]
            return result
        scaled = self.alphas * self.alpha_scale  # the entries of R_i are sqrt(k)
        places = self.bases.B[: math.prod(sizes), 0, 0]
        return torch.cat([scaled, -scaled])[places].view(sizes)


def signed_places(seed: int, count: int, size: int, device: torch.device) -> Tensor:
    """Return the coefficient i of each of ``size`` entries as i, or as i + ``count`` if its sign is negative, int32.

    Each ``count`` consecutive entries have every coefficient once, in a random order.
    """
    blocks = -(-size // count)
    result = torch.empty(blocks, count, dtype=torch.int32, device=device)
    if device.type == "meta":
        return result.flatten()[:size]
    step = max(1, CHUNK // count)
    for first in range(0, blocks, step):
        rows = torch.arange(first, min(first + step, blocks), device=device)
        words = grid_words(seed, stream("places of PRANC"), rows.new_zeros(1), rows, count)[0]
        order = (words >> 1).argsort(dim=1, stable=True)
        result[first : first + step] = order + count * (words & 1)
    return result.flatten()[:size]
