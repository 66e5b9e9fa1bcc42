"""The contract of every method: `Adapter` is what a user writes, `DeltaWeight` is what trains.

An adapter describes a method and its options and knows no model. For each adapted weight it makes one
`DeltaWeight`, whose `delta` is the definition and whose `linear` is the fast path; the two must agree.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.adapters.kernels.dropout import dropped
from randlora_pl.adapters.kernels.flop_choice import builds
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class WeightShape:
    """A weight to adapt: the layer's name, and out x in as in ``nn.Linear.weight``."""

    layer: str
    out_features: int
    in_features: int

    @property
    def large(self) -> int:
        """D, the larger side."""
        return max(self.out_features, self.in_features)

    @property
    def small(self) -> int:
        """d, the smaller side."""
        return min(self.out_features, self.in_features)


def matches(pattern: str, layer: str) -> bool:
    """Whether a regular expression fits a layer's whole name, or all of it behind some dot."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer) is not None


class DeltaWeight(nn.Module):
    """The trainable update of one weight.

    Args:
        dropout: Probability of dropping an input of the adapter's path; the frozen path is untouched:
            ``x @ W0.T + drop(x) @ delta.T``.

    Attributes:
        keep: Whether a layer may keep a matrix of its weight's size for the backward pass; None leaves it to the
            method, False takes it for too large where there is another way.
        kept: Names of persistent buffers that belong to the result and do not train by a gradient, such as a mask.
            Files and checkpoints hold them beside the trained tensors, under the same conditions.
    """

    keep: bool | None = None
    kept: tuple[str, ...] = ()

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def delta(self) -> Tensor:
        """The update as an (out, in) matrix: the definition of the method."""
        raise NotImplementedError

    def effective_weight(self, weight: Tensor) -> Tensor:
        """The adapted weight, (out, in), from the frozen one; W0 + delta unless a method says otherwise."""
        return weight + self.delta().to(weight.dtype)

    def change(self, weight: Tensor) -> Tensor:
        """The effective weight minus the frozen one, (out, in): ``delta`` for methods that add."""
        if type(self).effective_weight is DeltaWeight.effective_weight:
            return self.delta()  # without the rounding of a sum and a difference
        return self.effective_weight(weight) - weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` with the effective weight; x is (..., in), the result (..., out)."""
        if not self.drops:
            return F.linear(x, self.effective_weight(weight), bias)
        return F.linear(x, weight, bias) + self.contribution(x, lambda: weight)

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """What the update adds to the frozen layer's outputs, ``drop(x) @ change(W0).T``: (..., in) to (..., out).

        Args:
            x: The layer's input.
            weight: Gives W0 (out, in) to methods whose change depends on it; the others never ask, as it may be dear.
        """
        return F.linear(self.dropped(x), like(self.delta(), x))

    def apart(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What the update adds beside the frozen layer, ``product(drop(x), change(W0))``, for any product of a layer.

        Args:
            x: The layer's input.
            weight: W0, (out, in).
            product: Applies a matrix (out, in) to inputs, as ``F.linear`` or as a convolution.
        """
        return product(self.dropped(x), self.change(weight))

    @property
    def drops(self) -> bool:
        """Whether dropout acts now, so that the two paths see different inputs."""
        return self.dropout > 0 and self.training

    def dropped(self, x: Tensor) -> Tensor:
        """The input of the adapter's path."""
        return dropped(x, self.dropout) if self.drops else x

    def extra_repr(self) -> str:
        """The trainable tensors and their shapes."""
        return ", ".join(f"{name}={tuple(value.shape)}" for name, value in self.named_parameters(recurse=False))


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in the dtype of ``x``, so that float32 adapters serve bfloat16 models without autocast."""
    return tensor.to(x.dtype)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a matrix product of this tensor is to have: autocast's, where it is on and not float64."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64:  # autocast leaves it alone
        return tensor.dtype
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device has none
    return torch.get_autocast_dtype(kind) if on else tensor.dtype


class FactoredDelta(DeltaWeight):
    """An update P Q with P (out, k) and Q (k, in): two thin products where they cost less than one wide."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """P (out, k), which carries the scaling, and Q (k, in)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """P Q, (out, in)."""
        p, q = self.factors()
        return p @ q

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Adds the two thin products to the frozen layer, or builds W0 + P Q where that takes fewer operations."""
        p, q = self.factors()
        may_build = self.keep is not False and not self.drops
        if may_build and builds(x.numel() // x.shape[-1], q.shape[0], weight, p.requires_grad):
            return F.linear(x, weight + (p @ q).to(weight.dtype), bias)
        hidden = F.linear(self.dropped(x), like(q, x))
        plain = F.linear(x, weight, bias)
        rows = plain.reshape(-1, plain.shape[-1]), hidden.reshape(-1, hidden.shape[-1])
        return torch.addmm(*rows, like(p, hidden).T).view(plain.shape)  # one pass over the outputs less than a sum

    def contribution(self, x: Tensor, weight: Callable[[], Tensor]) -> Tensor:
        """The two thin products, (..., in) to (..., out)."""
        p, q = self.factors()
        hidden = F.linear(self.dropped(x), like(q, x))
        return F.linear(hidden, like(p, hidden))


class Adapter:
    """A method and its options, as written in a config.

    Args:
        qkv: How packed query/key/value weights are adapted: ``packed`` as one 3d x d matrix (the paper),
            ``split`` as three d x d matrices (exports to models with separate projections).
        match: Choose the rank whose trainable count is nearest to another method's on this model, for
            example ``lora:32``; the count of both is printed.
        seed: Selects the random bases and initial values; the run's seed where it is left out.
    """

    rank: Any
    trains_base = False  # whether the method changes the model's own tensors instead of adding to them
    reads_weight = False  # whether an update starts from the numbers of the frozen weight

    def __init__(
        self, *, qkv: Literal["packed", "split"] = "packed", match: str | None = None, seed: int | None = None
    ) -> None:
        if qkv not in ("packed", "split"):
            raise UserError(f"qkv is {qkv!r}: choose packed or split.")
        self.qkv = qkv
        self.match = match
        self.seed = seed

    @classmethod
    def method(cls) -> str:
        """The method's name in files, tables and on the command line."""
        return cls.__name__

    def options(self) -> dict[str, Any]:
        """The constructor's arguments as JSON values, enough to make the same adapter again."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: value.describe() if isinstance(value, Adapter) else value for name, value in values.items()}

    def describe(self) -> dict[str, Any]:
        """``{"method": ..., "options": {...}}``, the form of ``adapter_config.json``."""
        return {"method": self.method(), "options": self.options()}

    def identity(self) -> dict[str, Any]:
        """``describe`` without what does not change the update: two adapters of one identity are the same."""
        options = self.options()
        for name in inspect.signature(type(self)).parameters:
            if isinstance(inner := getattr(self, name), Adapter):
                options[name] = inner.identity()
        return {"method": self.method(), "options": options}

    def replace(self, **changes: Any) -> Self:
        """A copy with some options changed."""
        values = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return type(self)(**(values | changes))

    @property
    def key(self) -> int:
        """The seed, 0 where none was given."""
        return self.seed or 0

    def of(self, option: Any, shape: WeightShape, default: Any) -> Any:
        """A per-layer option: the value itself, or that of the first pattern that fits the layer's name."""
        if not isinstance(option, dict):
            return option
        return next((value for pattern, value in option.items() if matches(pattern, shape.layer)), default)

    def count(self, shape: WeightShape) -> int:
        """Trainable parameters of one weight."""
        raise NotImplementedError

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """The random tensors that all layers share, at the largest needed size; None where there are none."""
        return None

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> DeltaWeight:
        """The update of one weight, zero at the start; ``weight`` is the frozen one, for dtype and device."""
        raise NotImplementedError

    def check_rank(self, shape: WeightShape, rank: int, at_most_small: bool = True) -> int:
        """The rank, if it is possible for this weight.

        Raises:
            UserError: If it is not positive, or above the smaller side where the method forbids that.
        """
        if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
            raise UserError(f"{self.method()}: rank is {rank!r}; give a positive whole number (--model.adapter.rank).")
        if at_most_small and rank > shape.small:
            raise UserError(
                f"{self.method()}: rank {rank} is larger than the smaller side {shape.small} of {shape.layer} "
                f"({shape.out_features} x {shape.in_features}); choose a rank up to {shape.small}, or leave "
                "this layer out of the targets."
            )
        return rank


def check_dropout(dropout: float) -> float:
    """The dropout probability.

    Raises:
        UserError: If it is not in [0, 1).
    """
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: give a probability of at least 0 and below 1.")
    return dropout


def trainable(weight: Tensor, *shape: int, fill: float | None = None) -> nn.Parameter:
    """A parameter beside ``weight``: on its device, float32 unless the model is float64."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if fill is None:
        return nn.Parameter(torch.empty(*shape, dtype=dtype, device=weight.device))
    return nn.Parameter(torch.full(shape, fill, dtype=dtype, device=weight.device))
