"""Methods that contain other methods: DoRA and Together.

DoRA trains the magnitudes of the rows apart from their directions, with any additive method (Liu et al., 2024).
Together sums the updates of several methods, trained jointly (section 6.6 of the RandLoRA paper).
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import (
    Adapter,
    DeltaWeight,
    FactoredDelta,
    Layers,
    Part,
    PeftContent,
    PeftFile,
    Procedure,
    like,
)
from randlora_pl.adapters.kernels.common import rounded
from randlora_pl.adapters.layers import WeightedSum
from randlora_pl.adapters.methods.autolora import AutoLoRA
from randlora_pl.adapters.methods.lora import PEFT_FORM, LoRA
from randlora_pl.adapters.methods.randlora import RandLoRA
from randlora_pl.adapters.random_bases import Bases, WeightShape, trainable
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Positive


class DoRA(Adapter):
    """DoRA: W = m * (W0 + delta) / ||W0 + delta||, each row scaled to a trained magnitude.

    Examples:
        >>> inject(model, DoRA(LoRA(rank=4))).trainable  # DoRA(RandLoRA(rank=6)) works, too
        21120
    """

    inner: Adapter = dataclasses.field(default=None, kw_only=False)  # type: ignore[assignment]
    """Method of delta, LoRA (the original) or RandLoRA; its ``qkv``, ``match`` and ``seed`` are used."""
    dropout: float = dataclasses.field(init=False, default=0.0)
    qkv: Any = dataclasses.field(init=False, default="packed")
    match: str | None = dataclasses.field(init=False, default=None)
    seed: int | None = dataclasses.field(init=False, default=None)

    reads_weight = True
    peft = dataclasses.replace(
        PEFT_FORM,
        tensors=(*PEFT_FORM.tensors, "lora_magnitude_vector"),
        convolutions=False,
        packed=False,
        when=lambda config: bool(config.get("use_dora")),
    )

    def __post_init__(self) -> None:
        # An object as default would pass its alpha on to an inner method of another class in a config.
        object.__setattr__(self, "inner", LoRA() if self.inner is None else self.inner)
        super().__post_init__()
        inner = self.inner
        if inner.trains_base or isinstance(inner, DoRA | AutoLoRA) or not inner.fixed:
            raise UserError(f"DoRA: inner is {inner.method()}. Choose a method whose update is a matrix, such as LoRA.")
        if inner.nested_options() and any(leaf.dropout for leaf in inner.leaves()):
            raise UserError(
                f"DoRA: parts of its inner {inner.method()} have dropout, which has no place here. Set it to 0."
            )
        for name in ("qkv", "match", "seed"):
            object.__setattr__(self, name, getattr(inner, name))

    @property
    def rank(self) -> Any:
        """Rank of the inner method, None if it has none."""
        return getattr(self.inner, "rank", None)

    def replace(self, **changes: Any) -> "DoRA":
        """Return a copy with changed options of the inner method."""
        return DoRA(changes["inner"] if "inner" in changes else self.inner.replace(**changes))

    def count(self, shape: WeightShape) -> int:
        """Return the inner method's parameters plus one magnitude per output."""
        return self.inner.count(shape) + shape.out_features

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """Return the bases of the inner method."""
        return self.inner.bases(shapes, device)

    def procedure(self, model: nn.Module) -> Procedure | None:
        """Return the procedure of the inner method."""
        return self.inner.procedure(model)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "DoRADelta":
        """Create the inner update and the magnitudes (out), which start at the row norms of the frozen weight."""
        return DoRADelta(self.inner.delta_weight(shape, weight, bases), weight)

    def peft_problem(self) -> str:
        """Return the reason that PEFT cannot have an inner method other than LoRA."""
        if isinstance(self.inner, LoRA):
            return ""
        return f"PEFT's DoRA wraps LoRA only, this one wraps {self.inner.method()}"

    def to_peft(self, parts: list[Part], bases: Bases | None) -> PeftFile:
        """Convert the inner LoRA, and add the magnitudes."""
        inner = [
            dataclasses.replace(part, tensors={name: part.tensors[f"inner.{name}"] for name in "AB"}) for part in parts
        ]
        config, tensors = self.inner.to_peft(inner, bases)
        tensors |= {f"{part.path}.lora_magnitude_vector": part.tensors["magnitude"] for part in parts}
        return config | {"use_dora": True}, tensors

    @classmethod
    def from_peft(cls, content: PeftContent) -> tuple[Adapter, Layers, None]:
        """Convert PEFT's LoRA with magnitudes."""
        inner, layers, _ = LoRA.from_peft(content)
        ours = {
            layer: {f"inner.{name}": own[name] for name in "AB"}
            | {"magnitude": content.layers[layer]["lora_magnitude_vector"]}
            for layer, own in layers.items()
        }
        return cls(inner), ours, None


class DoRADelta(DeltaWeight):
    """m * (W0 + delta) / ||W0 + delta||; the norm is a constant for the gradient (section 4.3 of DoRA).

    As in the original, dropout also affects the scaled part of W0.
    """

    undecayed = ("magnitude",)

    def __init__(self, inner: DeltaWeight, weight: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.magnitude = trainable(weight, weight.shape[0])
        with torch.no_grad():
            self.magnitude.copy_(torch.linalg.vector_norm(weight.to(self.magnitude.dtype), dim=1))

    def row_scale(self, weight: Tensor, delta: Tensor) -> Tensor:
        """Return m / ||W0 + delta||, (out)."""
        # In the magnitude's dtype, so that the scale is 1 at the start. Zero rows stay zero.
        dtype = self.magnitude.dtype
        norm = torch.linalg.vector_norm(weight.detach().to(dtype) + delta.detach().to(dtype), dim=1)
        scale: Tensor = self.magnitude / norm.clamp_min(torch.finfo(dtype).tiny)
        return scale

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return the rows of W0 + delta, scaled to the magnitudes, (out, in)."""
        delta = self.inner.change(weight)
        return rounded(self.row_scale(weight, delta)[:, None] * (weight + delta.to(self.magnitude.dtype)), weight.dtype)

    def change(self, weight: Tensor) -> Tensor:
        """Return (s - 1) W0 + s delta with the row scales s, (out, in); avoids rounding of a sum and a difference."""
        delta = self.inner.change(weight)
        scale = self.row_scale(weight, delta)[:, None]
        return (scale - 1) * weight + scale * delta

    @property
    def drops(self) -> bool:
        """True if dropout of the inner method is active."""
        return self.inner.drops

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input of the inner method's path."""
        return self.inner.dropped(x)


class Together(Adapter):
    """Together: W = W0 + sum_i (W_i - W0), the sum of the updates of several methods on the same layers.

    Examples:
        >>> inject(model, Together([LoRA(rank=2), RandLoRA(rank=12)])).trainable
        17424
    """

    parts: list[Adapter] = dataclasses.field(default=None, kw_only=False)  # type: ignore[arg-type]
    """Two or more methods whose updates are added, by default LoRA of rank 8 and RandLoRA of rank 6. Each has its own
    options; ``match`` of one of them chooses its size so that the sum has the given parameters."""
    rates: list[Annotated[float, Positive]] | None = None
    """Factor of the learning rate of each part, ``[10, 1]`` for instance. Default: 1 for all."""
    seed: int | None = None
    """Seed of the parts that have none: the first has this one, each other a stream of its own. Default: the run's
    seed."""

    dropout: float = dataclasses.field(init=False, default=0.0)
    qkv: Any = dataclasses.field(init=False, default="packed")
    match: str | None = dataclasses.field(init=False, default=None)

    group = "full rank"
    neutral = ("rates",)  # they affect training only

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", [LoRA(rank=8), RandLoRA(rank=6)] if self.parts is None else list(self.parts))
        super().__post_init__()
        parts = self.parts
        if wrong := [part.method() for part in parts if part.trains_base or isinstance(part, Together | AutoLoRA)]:
            raise UserError(f"Together: {wrong[0]} cannot be a part. Give methods that add to frozen weights, as LoRA.")
        if len(parts) < 2:
            raise UserError(f"Together: parts has {len(parts)}. Give two methods or more, such as LoRA and RandLoRA.")
        if len({part.qkv for part in parts}) > 1:
            raise UserError("Together: some parts have qkv packed and some split. Set the same in all parts.")
        procedures = [
            leaf.method() for part in parts for leaf in part.leaves() if type(leaf).procedure is not Adapter.procedure
        ]
        if len(procedures) > 1:
            raise UserError(
                f"Together: {' and '.join(procedures)} have training procedures of their own. Keep one of them."
            )
        if self.rates is not None and len(self.rates) != len(parts):
            raise UserError(
                f"Together: rates is {self.rates!r}. Set a positive number for each of the {len(parts)} parts."
            )
        object.__setattr__(self, "qkv", parts[0].qkv)

    @property
    def reads_weight(self) -> bool:  # type: ignore[override]
        """True if a part reads the frozen weight."""
        return any(part.reads_weight for part in self.parts)

    @property
    def fixed(self) -> bool:  # type: ignore[override]
        """True if no part depends on the input."""
        return all(part.fixed for part in self.parts)

    @property
    def proportional_to(self) -> tuple[str, ...]:  # type: ignore[override]
        """Tensors of all parts; none if a part has none."""
        parts = [[f"parts.{place}.{name}" for name in part.proportional_to] for place, part in enumerate(self.parts)]
        return tuple(name for names in parts for name in names) if all(parts) else ()

    def peft_problem(self) -> str:
        """Return the reason that PEFT cannot have a sum."""
        return "PEFT has no sum of methods"

    @cached_property
    def seeded(self) -> list[Adapter]:
        """Parts with the seeds that they use."""
        # Two parts of one method would otherwise have the same random tensors. Philox has keys of 64 bits.
        keys = [self.key + (place << 32) for place in range(len(self.parts))]
        return [p if p.seed is not None else p.replace(seed=key) for p, key in zip(self.parts, keys, strict=True)]

    def count(self, shape: WeightShape) -> int:
        """Return the sum of the parts' parameters."""
        return sum(part.count(shape) for part in self.parts)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> "PartBases | None":
        """Return the bases of each part, or None if no part has any."""
        parts = [part.bases(shapes, device) for part in self.seeded]
        return PartBases(parts) if any(each is not None for each in parts) else None

    def procedure(self, model: nn.Module) -> Procedure | None:
        """Return the procedure of the part that has one."""
        procedures = (part.procedure(model) for part in self.seeded)
        return next((each for each in procedures if each is not None), None)

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "TogetherDelta":
        """Create the update of each part."""
        own = bases.parts if isinstance(bases, PartBases) else [None] * len(self.parts)
        updates = [part.delta_weight(shape, weight, each) for part, each in zip(self.seeded, own, strict=True)]
        return TogetherDelta(updates, self.rates)


class PartBases(Bases):
    """Random bases of several methods, None for those without; each update holds the bases of its own method."""

    def __init__(self, parts: Sequence[Bases | None]) -> None:
        present = [each for each in parts if each is not None]
        nothing = present[0].A.new_empty(0, 0, 0)
        super().__init__(0, nothing, nothing)
        self.parts, self.held = list(parts), nn.ModuleList(present)  # the list registers their buffers
        self.fingerprint = "".join(each.fingerprint for each in present)


class TogetherDelta(WeightedSum):
    """Sum of updates; one of them is applied with W0 in one product, and the others are added to its outputs."""

    def __init__(self, parts: Sequence[DeltaWeight], rates: Sequence[float] | None = None) -> None:
        super().__init__(parts, [1] * len(parts))
        self.rates = {f"parts.{place}": rate for place, rate in enumerate(rates or ())}

    def add(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply W0 with the first part that has no thin product, and add the outputs of the others.

        So neither the sum nor the matrix of a thin part, such as LoRA's, is built.
        """
        parts: list[DeltaWeight] = list(self.parts)  # type: ignore[arg-type]
        first = next((part for part in parts if not isinstance(part, FactoredDelta)), parts[0])
        outputs = [  # in the order of `contribution`, so that dropout draws the same masks
            part.add(x, weight, bias) if part is first else part.contribution(x, lambda: weight) for part in parts
        ]
        whole = outputs.pop(parts.index(first))
        return sum((like(output, whole) for output in outputs), whole)
