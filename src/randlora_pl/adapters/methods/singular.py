"""Methods on the singular vectors of a weight: PiSSA with its relatives, LoRA-XS and SVFT.

- PiSSA is a LoRA that starts at the principal components of the weight (Meng et al., 2024).
- LoRA-XS trains an r x r matrix between frozen singular vectors (Balazy et al., 2024).
- SVFT trains entries between them (Lingam et al., 2024, arXiv:2405.19597), with W0 = U diag(s) V^T and
  delta W = U M V^T.

U (out, m) and V^T (m, in), m = min(out, in), are frozen. M (m, m) is sparse: its entries at fixed places train, all
others are zero. It starts at zero, as in the paper. The released code starts at random values, and counts one gate more
for each weight. Here W0 is added instead of built from its factors, so the pretrained model keeps its bits.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, FactoredDelta, Layers, PeftContent, Rank, like, plus_product
from randlora_pl.adapters.derived import DerivedAdapter, DerivedDelta, RecipeName
from randlora_pl.adapters.methods.lora import PEFT_FORM, LoRA, rates_of_factors
from randlora_pl.adapters.methods.shira import distinct
from randlora_pl.adapters.random_bases import Bases, WeightShape, draw_parameter, per_layer, trainable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import NotNegative, Positive


class PiSSA(DerivedAdapter):
    """PiSSA: delta = scaling * (B A - B0 A0), where trained B and A start at B0 and A0, the largest part of the weight.

    The frozen weight is not changed, so the model starts exactly at the pretrained one. Weight decay is off for this
    method, because B and A contain the largest components of the pretrained weight. Dropout harms it for that reason,
    too.

    Examples:
        >>> inject(model, PiSSA(rank=4)).trainable
        18432
    """

    rank: Rank = 32
    """Rank r, up to the smaller side of a weight. A number, or numbers by pattern of layer names."""
    alpha: float | dict[str, float] | None = None
    """The update is scaled by alpha / r. A number, or numbers by pattern, as ``rank``. Default: r, a scaling of 1 as in
    the paper."""
    start: Literal["pissa", "olora", "minor"] = "pissa"
    """``pissa``: B0 A0 is the best approximation of W0 of rank r (equation 2 of arXiv 2404.02948). ``olora``: Q and R
    of the first r columns (OLoRA, arXiv 2406.01775). ``minor``: the left singular vectors of the r smallest singular
    values as a frozen B, and a trained A that starts at zero (MiCA)."""
    rate_ratio: Annotated[float, Positive] = 1.0
    """Learning rate of B divided by the one of A (LoRA+, Hayou et al., 2024), which is ``--model.learning_rate``."""

    neutral = (*DerivedAdapter.neutral, "rate_ratio")
    learning_rates = (1e-4, 1e-4, 2e-5)  # a first value; published for language models only

    exports_factors = True  # of rank 2r
    peft = dataclasses.replace(
        PEFT_FORM,
        kernels=None,
        convolutions=False,
        starts=("pissa", "olora"),
        when=lambda config: config.get("init_lora_weights") in ("pissa", "olora"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "minor" and self.rate_ratio != 1:
            raise UserError("PiSSA: B is frozen with start minor, so it has no rate. Remove rate_ratio.")

    def scaling_of(self, shape: WeightShape) -> float:
        """Return alpha / r for one layer.

        Raises:
            UserError: Alpha is not positive.
        """
        alpha = self.value("alpha", shape)
        if alpha is not None and not alpha > 0:
            raise UserError(f"PiSSA: alpha is {alpha} for {shape.layer}. Set a positive number.")
        return super().scaling_of(shape)

    def count(self, shape: WeightShape) -> int:
        """Return r (out + in), or r in for ``minor``."""
        return self.rank_of(shape) * (shape.in_features + (0 if self.start == "minor" else shape.out_features))

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> DerivedDelta:
        """Create the update of one weight, with A (r, in) and, unless it is frozen, B (out, r)."""
        return (MinorDelta if self.start == "minor" else PiSSADelta)(self, shape, weight)

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, None]:
        """Convert PEFT's LoRA whose start was subtracted from the base weight."""
        start = content.config["init_lora_weights"]
        for layer in content.layers:
            if layer.endswith("in_proj") or (layer in content.transposed and start == "olora"):
                raise UserError(
                    f"{content.source}: PEFT's {start} of {layer} does not start at this weight. Merge it with PEFT "
                    "instead: model.merge_and_unload()"
                )
        lora, layers, _ = LoRA.from_peft(content)
        alphas = {
            layer: lora.value("alpha", shape) * (lora.value("rank", shape) ** 0.5 if lora.rslora else 1)
            for layer, shape in content.shapes.items()
        }
        return cls(rank=lora.rank, alpha=per_layer(alphas), start=start, dropout=lora.dropout), layers, None


class PiSSADelta(DerivedDelta, FactoredDelta):
    """scaling * (B A - B0 A0) of one weight, as the product of [B - B0, B0] and [A; A - A0], which is zero at first."""

    undecayed = ("A", "B")

    def __init__(self, adapter: PiSSA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank, self.scaling = adapter.rank_of(shape), adapter.scaling_of(shape)
        self.rates = rates_of_factors(adapter.rate_ratio)
        recipe: RecipeName = "gram/1" if adapter.start == "pissa" else "qr/1"
        left, values, right = self.decompose(adapter, recipe, shape, weight, rank)
        # OLoRA's Q and R are not divided by the scaling, as in PEFT; the values are ones there.
        roots = (values / self.scaling).sqrt() if adapter.start == "pissa" else values
        self.hold(weight, B0=left * roots, A0=roots[:, None] * right)
        self.A = trainable(weight, rank, shape.in_features)
        self.B = trainable(weight, shape.out_features, rank)
        with torch.no_grad():
            self.A.copy_(self.get_buffer("A0"))
            self.B.copy_(self.get_buffer("B0"))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scaled [B - B0, B0], (out, 2r), and [A; A - A0], (2r, in)."""
        b0, a0 = self.get_buffer("B0").to(self.B.dtype), self.get_buffer("A0").to(self.A.dtype)
        return torch.cat([self.B - b0, b0], 1) * self.scaling, torch.cat([self.A, self.A - a0])

    def sketched(self) -> dict[str, Tensor]:
        """Return B0 A0 alone: no signs or rotations of the singular vectors change the update."""
        return {"B0A0": self.get_buffer("B0").double() @ self.get_buffer("A0").double()}


class MinorDelta(DerivedDelta, FactoredDelta):
    """scaling * U A of one weight, with the left singular vectors U (out, r) of its smallest singular values."""

    def __init__(self, adapter: PiSSA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank, self.scaling = adapter.rank_of(shape), adapter.scaling_of(shape)
        self.hold(weight, U=self.decompose(adapter, "minor/1", shape, weight, rank)[0])
        self.A = trainable(weight, rank, shape.in_features, fill=0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scaled U, (out, r), and A, (r, in)."""
        return self.get_buffer("U").to(self.A.dtype) * self.scaling, self.A


class LoRAXS(DerivedAdapter):
    """LoRA-XS: delta = scaling * U R S V^T with a trained R (r, r) and the top r singular triples of the weight.

    Examples:
        >>> inject(model, LoRAXS(rank=4)).trainable
        288
    """

    rank: Rank = 64
    """Rank r, up to the smaller side of a weight. A number, or numbers by pattern of layer names."""
    alpha: float | dict[str, float] | None = None
    """The update is scaled by alpha / r (the released scripts: 16 / r on GLUE, r / r for mathematics). A number, or
    numbers by pattern, as ``rank``. Default: r, a scaling of 1."""
    init: Literal["zero", "official"] = "zero"
    """``zero`` starts at the pretrained model; ``official`` draws R with a standard deviation of 1e-5."""
    balance: Literal["right", "both"] = "right"
    """``right`` multiplies V^T by the singular values (the paper), ``both`` gives their roots to U and V^T, which makes
    the gradients of R less uneven."""

    learning_rates = (1e-3, 1e-3, 1e-3)  # its released scripts for GLUE, up to this
    proportional_to = ("R",)

    exports_factors = True  # of rank r

    def count(self, shape: WeightShape) -> int:
        """Return r^2."""
        return self.rank_of(shape) ** 2

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "LoRAXSDelta":
        """Create the update of one weight, with R (r, r)."""
        return LoRAXSDelta(self, shape, weight)


class LoRAXSDelta(DerivedDelta, FactoredDelta):
    """scaling * U R V of one weight; V (r, in) contains the singular values."""

    def __init__(self, adapter: LoRAXS, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank = adapter.rank_of(shape)
        self.scaling = adapter.scaling_of(shape)
        left, values, right = self.decompose(adapter, "gram/1", shape, weight, rank)
        if adapter.balance == "both":
            left, values = left * values.sqrt(), values.sqrt()
        self.hold(weight, U=left, V=values[:, None] * right)
        self.R = trainable(weight, rank, rank, fill=0.0)
        if adapter.init == "official":
            self.R = draw_parameter(weight, adapter.key, f"loraxs/{shape.layer}", rank, rank, "normal", 1e-5)

    def frozen(self) -> tuple[Tensor, Tensor]:
        """Return U (out, r) and V (r, in) in the dtype of R."""
        return self.get_buffer("U").to(self.R.dtype), self.get_buffer("V").to(self.R.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scaled U R, (out, r), and V, (r, in)."""
        u, v = self.frozen()
        return u @ (self.R * self.scaling), v

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Mix r numbers of each token, so that U and V need no gradient, or build W0 + U R V if that is cheaper."""
        tokens, rank = x.numel() // x.shape[-1], len(self.R)
        built = (tokens + 3 * rank) * weight.numel()
        if self.keep is not False and not self.drops and built < 2 * tokens * rank * sum(weight.shape):
            return super().add(x, weight, bias)
        return plus_product(nn.functional.linear(x, weight, bias), self._mixed(x), self.frozen()[0])

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """Return the three thin products, (..., in) to (..., out)."""
        mixed = self._mixed(x)
        return nn.functional.linear(mixed, like(self.frozen()[0], mixed))

    def _mixed(self, x: Tensor) -> Tensor:
        """Return ``drop(x) V^T R^T``, (..., r), scaled."""
        hidden = nn.functional.linear(self.dropped(x), like(self.frozen()[1], x))
        return nn.functional.linear(hidden, like(self.R * self.scaling, hidden))


class SVFT(DerivedAdapter):
    """SVFT: delta = U M V^T with the singular vectors of the weight and a sparse, trained M.

    Examples:
        >>> inject(model, SVFT(pattern="banded", off_diagonals=2)).trainable
        5652
    """

    pattern: Literal["plain", "banded", "random", "top_k"] = "banded"
    """Places of the trained entries of M: ``plain``, the diagonal; ``banded``, with k diagonals on each side of it;
    ``random``, as many entries as ``banded`` has, at random places; ``top_k``, as many where the left and right
    singular vectors are most alike, for square weights only."""
    off_diagonals: Annotated[int, NotNegative] = 2
    """Number k of diagonals, 0 to m - 1. With m - 1, any update of a square weight can be reached. ``plain`` does not
    use it."""

    group = "full rank"
    size_option = "off_diagonals"
    proportional_to = ("values",)
    holds_factors = True

    @property
    def learning_rates(self) -> tuple[float, float, float]:  # type: ignore[override]
        """Rates of its code, lower with more than two diagonals on each side."""
        return (5e-2, 5e-2, 5e-2) if self.half_width <= 2 else (5e-3, 5e-3, 5e-3)

    @property
    def half_width(self) -> int:
        """Diagonals on each side of the main one; of other patterns, those with as many entries."""
        return 0 if self.pattern == "plain" else self.off_diagonals

    def sizes(self, shapes: Sequence[WeightShape]) -> Sequence[int]:
        """Return 0 to m - 1 for the smallest m."""
        return range(1 if self.pattern == "plain" else min(shape.small for shape in shapes))

    def count(self, shape: WeightShape) -> int:
        """Return m (2 k + 1) - k (k + 1).

        Raises:
            UserError: k is too large for this weight, or it is not square and the pattern is ``top_k``.
        """
        k, m, sizes = self.half_width, shape.small, f"{shape.out_features} x {shape.in_features}"
        if k >= m:
            raise UserError(
                f"SVFT: {k} off-diagonals are too many for {shape.layer} ({sizes}); set --model.adapter.off_diagonals "
                f"to at most {m - 1}, or leave this layer out of the targets."
            )
        if self.pattern == "top_k" and shape.out_features != shape.in_features:
            raise UserError(
                f"SVFT: top_k needs square weights, {shape.layer} is {sizes}. Set --model.adapter.pattern banded or "
                "random, or only square targets (--model.targets '[qkv, o]' with --model.adapter.qkv split)."
            )
        return m * (2 * k + 1) - k * (k + 1)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "SVFTDelta":
        """Create the update of one weight, with the trained entries of M."""
        return SVFTDelta(self, shape, weight)


class SVFTDelta(DerivedDelta, FactoredDelta):
    """U M V^T of one weight."""

    places: Tensor  # p m + q for each trained entry (p, q) of M, ascending

    def __init__(self, adapter: SVFT, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        left, _, right = self.decompose(adapter, "svd/1", shape, weight, shape.small)
        self.hold(weight, U=left, V=right)
        self.values = trainable(weight, adapter.count(shape), fill=0.0)
        stored = adapter.pattern == "top_k"  # last bits of the vectors could decide between two places
        if stored:
            self.kept, self.indexes = (*self.kept, "places"), {"places": shape.small**2}
        if weight.is_meta:
            places = torch.empty(len(self.values), dtype=torch.int32, device="meta")
        elif stored:  # where the inner products u_p v_q are largest, without their signs; of equals the first
            u, v = (self.get_buffer(name).cpu().double().T for name in ("U", "V"))
            order = (u @ v).abs().flatten().argsort(descending=True, stable=True)
            places = order[: len(self.values)].sort()[0]
        elif adapter.pattern == "random":
            places = distinct(adapter.key, f"svft/{shape.layer}", len(self.values), shape.small**2)
        else:  # at most k from the diagonal
            rows, k = torch.arange(shape.small)[:, None], adapter.half_width
            columns = rows + torch.arange(-k, k + 1)
            places = (rows * shape.small + columns)[(columns >= 0) & (columns < shape.small)]
        self.register_buffer("places", places.to(weight.device, torch.int32), persistent=stored)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return U (out, m) and M V^T (m, in), whose row p is the sum of M_pq V_q over the trained entries.

        So the gradient of M is computed at these entries only, as inner products of rows of U^T G and of V^T.
        """
        u, v = (self.get_buffer(name).to(self.values.dtype) for name in ("U", "V"))
        places, m = self.places.long(), len(v)
        first = torch.searchsorted(places, torch.arange(0, m * m, m, device=places.device))  # of each row
        return u, nn.functional.embedding_bag(places % m, v, first, mode="sum", per_sample_weights=self.values)
