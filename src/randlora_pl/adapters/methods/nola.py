"""NoLA: low-rank factors as trained combinations of random factors (Koohpayegani et al., 2024)."""

from typing import Literal

import torch
from torch import Tensor

from randlora_pl.adapters.base import Adapter, FactoredDelta, Rank
from randlora_pl.adapters.random_bases import Bases, WeightShape, random_pair, trainable
from randlora_pl.utils.options import Count


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
        self.scaling = adapter.value("alpha", shape) / self.rank
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
