"""LoRA-XS: an r x r matrix between frozen singular vectors of the weight (Balazy et al., 2024)."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from randlora_pl.adapters.base import FactoredDelta, Rank, like, plus_product
from randlora_pl.adapters.derived import DerivedAdapter, DerivedDelta
from randlora_pl.adapters.random_bases import Bases, WeightShape, draw_parameter, trainable


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
        alpha = adapter.value("alpha", shape)
        self.scaling = 1.0 if alpha is None else float(alpha) / rank
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
