"""Methods on frozen pairs of random matrices: VeRA and NoLA.

VeRA trains vectors that scale one pair (Kopiczko et al., 2024). NoLA trains the combinations of many (Koohpayegani et
al., 2024).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import (
    UNLIMITED,
    Adapter,
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
from randlora_pl.adapters.random_bases import Bases, WeightShape, draw_peft_vera, random_pair, sides, trainable
from randlora_pl.utils.options import Count


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

    peft = PeftForm(
        "VERA",
        frozenset({"r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection"}),
        ("vera_lambda_b", "vera_lambda_d"),
        shared=("vera_A", "vera_B"),
    )

    def largest_rank(self, shape: WeightShape) -> int:
        """Return the largest rank, which has hardly a limit."""
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
    """``zero`` starts one coefficient vector at 1/n and the other at zero, so that the model is unchanged at first;
    ``official`` starts both at 1/n, as the official RandLoRA code."""

    learning_rates = (1e-3, 1e-3, 1e-4)  # Table 8
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
