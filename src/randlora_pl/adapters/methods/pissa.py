"""PiSSA: LoRA that starts at the principal components of the weight (Meng et al., 2024), and its relatives."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from randlora_pl.adapters.base import Adapter, FactoredDelta, Layers, PeftContent, Rank
from randlora_pl.adapters.derived import DerivedAdapter, DerivedDelta, RecipeName
from randlora_pl.adapters.methods.lora import PEFT_FORM, LoRA
from randlora_pl.adapters.random_bases import Bases, WeightShape, per_layer, trainable
from randlora_pl.utils.errors import UserError


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

    learning_rates = (1e-4, 1e-4, 2e-5)  # a first value; published for language models only

    exports_factors = True  # of rank 2r
    peft = dataclasses.replace(
        PEFT_FORM,
        kernels=None,
        convolutions=False,
        starts=("pissa", "olora"),
        when=lambda config: config.get("init_lora_weights") in ("pissa", "olora"),
    )

    def scaling_of(self, shape: WeightShape) -> float:
        """Return alpha / r for one layer.

        Raises:
            UserError: Alpha is not positive.
        """
        alpha = self.value("alpha", shape)
        if alpha is not None and not alpha > 0:
            raise UserError(f"PiSSA: alpha is {alpha} for {shape.layer}. Set a positive number.")
        return 1.0 if alpha is None else float(alpha) / self.rank_of(shape)

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
