"""DoRA: direction and magnitude trained apart, around any additive method (Liu et al., 2024)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from randlora_pl.adapters.base import Adapter, DeltaWeight, WeightShape, like, trainable
from randlora_pl.adapters.methods.fixed_rank.lora import LoRA
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.utils.errors import UserError


class DoRA(Adapter):
    """DoRA: W = m * (W0 + delta) / ||W0 + delta||, each row scaled to a trained magnitude.

    Args:
        inner: The method that gives delta, LoRA (the original) or RandLoRA; its ``qkv``, ``match`` and
            ``seed`` count.
    """

    reads_weight = True

    def __init__(self, inner: Adapter | None = None) -> None:
        inner = LoRA() if inner is None else inner
        if inner.trains_base or isinstance(inner, DoRA):
            raise UserError(f"DoRA: inner is {inner.method()}; choose a method that adds an update, such as LoRA.")
        super().__init__(qkv=inner.qkv, match=inner.match, seed=inner.seed)
        self.inner = inner

    @property
    def rank(self) -> Any:
        """The rank of the inner method."""
        return self.inner.rank

    def replace(self, **changes: Any) -> "DoRA":
        """A copy whose inner method has some options changed."""
        return DoRA(changes["inner"] if "inner" in changes else self.inner.replace(**changes))

    def count(self, shape: WeightShape) -> int:
        """The inner method's parameters and one magnitude for each output."""
        return self.inner.count(shape) + shape.out_features

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """Those of the inner method."""
        return self.inner.bases(shapes, device)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "DoRADelta":
        """The inner update and the magnitudes (out), which start at the row norms of the frozen weight."""
        return DoRADelta(self.inner.delta_weight(shape, weight, bases), weight)


class DoRADelta(DeltaWeight):
    """m * (W0 + delta) / ||W0 + delta||; the norm is a constant for the gradient (section 4.3 of DoRA)."""

    def __init__(self, inner: DeltaWeight, weight: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.magnitude = trainable(weight, weight.shape[0])
        with torch.no_grad():
            self.magnitude.copy_(torch.linalg.vector_norm(weight.to(self.magnitude.dtype), dim=1))

    def delta(self) -> Tensor:
        """The inner update, (out, in), before the rows are scaled."""
        return self.inner.delta()

    def row_scale(self, weight: Tensor, delta: Tensor) -> Tensor:
        """m / ||W0 + delta||, (out)."""
        # In the magnitude's own dtype, so that nothing is scaled at the start, and a row of zeros stays one.
        dtype = self.magnitude.dtype
        norm = torch.linalg.vector_norm(weight.detach().to(dtype) + delta.detach().to(dtype), dim=1)
        scale: Tensor = self.magnitude / norm.clamp_min(torch.finfo(dtype).tiny)
        return scale

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The rows of W0 + delta, scaled to the magnitudes."""
        delta = self.inner.delta()
        return (self.row_scale(weight, delta)[:, None] * (weight + delta)).to(weight.dtype)

    def change(self, weight: Tensor) -> Tensor:
        """(s - 1) W0 + s delta with the row scales s, (out, in): without the rounding of a sum and a difference."""
        delta = self.inner.delta()
        scale = self.row_scale(weight, delta)[:, None]
        return (scale - 1) * weight + scale * delta

    @property
    def drops(self) -> bool:
        """Whether the inner method drops inputs now."""
        return self.inner.drops

    def dropped(self, x: Tensor) -> Tensor:
        """The input that the inner method leaves."""
        return self.inner.dropped(x)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """``drop(x) @ change(W0).T``; as in the original, what the scales change of W0 x drops inputs, too."""
        return F.linear(self.dropped(x), like(self.change(weight()), x))
