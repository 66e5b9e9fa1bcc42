"""DoRA: separate training of direction and magnitude, with any additive method (Liu et al., 2024)."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.base import Adapter, DeltaWeight, Layers, Part, PeftContent, PeftFile, Procedure
from randlora_pl.adapters.kernels.common import rounded
from randlora_pl.adapters.methods.autolora import AutoLoRA
from randlora_pl.adapters.methods.lora import PEFT_FORM, LoRA
from randlora_pl.adapters.random_bases import Bases, WeightShape, trainable
from randlora_pl.utils.errors import UserError


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
