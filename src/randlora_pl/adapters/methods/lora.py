"""LoRA: a trained low-rank update (Hu et al., 2022), the baseline of every table of the paper."""

import math
from typing import Literal

from torch import Tensor

from randlora_pl.adapters.base import Adapter, FactoredDelta, Rank, drawn, trainable
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.weights import WeightShape


class LoRA(Adapter):
    """LoRA: delta = scaling * B A with trained B (out, r) and A (r, in).

    Examples:
        >>> inject(model, LoRA(rank=4, alpha=8)).trainable
        18432
    """

    rank: Rank = 32
    """Rank r. A number, or numbers by pattern of layer names."""
    alpha: float | dict[str, float] = 1.0
    """The update is scaled by alpha / r (Table 8: 1 / r). A number, or numbers by pattern, as ``rank``."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA, Kalajdzievski, 2023)."""
    init: Literal["kaiming", "official"] = "kaiming"
    """``kaiming`` starts with B at zero and A uniform up to 1 / sqrt(in). ``official`` is the start in the code of the
    RandLoRA paper: A at zero and B uniform up to 1 / sqrt(r out); for packed attention B at zero and A up to 1 / sqrt(r
    in)."""

    learning_rates = (1e-3, 1e-2, 1e-4)  # Table 8; section C.3; the released scripts

    def rank_of(self, shape: WeightShape) -> int:
        """Return the rank for one layer."""
        return self.check_rank(shape, self.of(self.rank, shape, 32))

    def count(self, shape: WeightShape) -> int:
        """Return r (out + in)."""
        return self.rank_of(shape) * (shape.out_features + shape.in_features)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "LoRADelta":
        """Create the update of one weight, with A (r, in) and B (out, r)."""
        return LoRADelta(self, shape, weight)


class LoRADelta(FactoredDelta):
    """scaling * B A of one weight; one of the two starts at zero (``init``)."""

    def __init__(self, adapter: LoRA, shape: WeightShape, weight: Tensor) -> None:
        super().__init__(adapter.dropout)
        rank = adapter.rank_of(shape)
        self.scaling = adapter.of(adapter.alpha, shape, 1.0) / (math.sqrt(rank) if adapter.rslora else rank)
        key, name, out, columns = adapter.key, f"lora/{shape.layer}", shape.out_features, shape.in_features
        official = adapter.init == "official"
        if official and not (shape.layer.rpartition(".")[2] == "in_proj" and out == 3 * columns):
            self.A = trainable(weight, rank, columns, fill=0.0)
            self.B = drawn(weight, key, name, out, rank, "uniform", 1 / math.sqrt(3 * rank * out))
        else:
            fan = rank * columns if official else columns
            self.A = drawn(weight, key, name, rank, columns, "uniform", 1 / math.sqrt(3 * fan))
            self.B = trainable(weight, out, rank, fill=0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scaled B, (out, r), and A, (r, in)."""
        return self.B * self.scaling, self.A
