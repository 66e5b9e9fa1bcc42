"""PRANC: a trained combination of k random matrices (Nooralinejad et al., 2023, arXiv:2206.08464), as an adapter.

    delta W = alpha_scale / sqrt(k) * sum_i alpha_i R_i

The R_i are frozen and have entries of unit variance; only the coefficients alpha (k) of each weight train.

- ``dense``: the R_i consist of signs. A step draws k signs for each entry of the weight, twice: see `sign_sums`.
- ``shared``: each entry of the weight belongs to one coefficient, with a random sign, as in the official code's
  compressed form and in Uni-LoRA. Over each k consecutive entries, in row-major order, the coefficients are a random
  permutation. So each has floor or ceil(out in / k) entries in every layer, and R_i has entries of sqrt(k) there. The
  R_i are orthogonal in exact arithmetic. This is not the dense matrix of the paper.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from randlora_pl.adapters.base import Adapter, DeltaWeight, trainable
from randlora_pl.adapters.kernels.sign_sums import CHUNK, SignSum, grid_words
from randlora_pl.adapters.random_bases import Bases
from randlora_pl.adapters.weights import WeightShape
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count
from randlora_pl.utils.rng import stream


class PRANC(Adapter):
    """PRANC: delta = alpha_scale / sqrt(k) * sum_i alpha_i R_i, with k trainable parameters per weight.

    Examples:
        >>> inject(model, PRANC(coefficients=500)).trainable
        9000
    """

    coefficients: Count = 10_000
    """Number k of random matrices and of trained coefficients per weight (the paper: 10,000 for a ResNet-20)."""
    form: Literal["shared", "dense"] = "shared"
    """``shared``: each entry of a weight belongs to one coefficient, so a step costs one addition per entry. ``dense``:
    the matrices of the paper, of signs, drawn in both passes of each step; k times as expensive, for tiny models or few
    coefficients."""
    alpha_scale: float = 1.0
    """The update is scaled by alpha_scale / sqrt(k), which makes its entries about as large as the coefficients at
    every k."""

    learning_rates = (1e-3, 1e-3, 1e-4)  # its code, from scratch
    group = "full rank"
    size_option = "coefficients"

    def count(self, shape: WeightShape) -> int:
        """Return k.

        Raises:
            UserError: The weight has fewer than k entries.
        """
        if self.coefficients > (most := shape.out_features * shape.in_features):
            raise UserError(
                f"PRANC: {self.coefficients} coefficients are more than the {most} entries of {shape.layer}; set "
                "--model.adapter.coefficients to fewer, or leave this layer out of the targets."
            )
        return self.coefficients

    def sizes(self, shapes: Sequence[WeightShape]) -> Sequence[int]:
        """Return the numbers that the smallest weight allows."""
        return range(1, min(shape.out_features * shape.in_features for shape in shapes) + 1)

    def bases(self, shapes: list[WeightShape], device: torch.device) -> Bases | None:
        """Draw the coefficient and sign of each entry of the largest weight, for the form ``shared``."""
        if self.form == "dense":
            return None
        size = max(shape.out_features * shape.in_features for shape in shapes)
        places = signed_places(self.key, self.coefficients, size, device)
        return Bases(self.key, torch.empty(0, 0, 0, device=device), places.view(1, -1, 1))

    def delta_weight(self, shape: WeightShape, weight: Tensor, bases: Bases | None) -> "PRANCDelta":
        """Create the update of one weight, with alpha (k), which starts at zero."""
        return PRANCDelta(self, shape, weight, bases)


class PRANCDelta(DeltaWeight):
    """alpha_scale / sqrt(k) * sum_i alpha_i R_i of one weight."""

    def __init__(self, adapter: PRANC, shape: WeightShape, weight: Tensor, bases: Bases | None) -> None:
        super().__init__(adapter.dropout)
        self.alphas = trainable(weight, adapter.coefficients, fill=0.0)
        self.bases, self.seed, self.alpha_scale = bases, adapter.key, adapter.alpha_scale
        self.out_features, self.in_features = shape.out_features, shape.in_features

    def delta(self) -> Tensor:
        """Return the combination, (out, in)."""
        sizes = self.out_features, self.in_features
        if self.bases is None:
            scaled = self.alphas * (self.alpha_scale / math.sqrt(len(self.alphas)))
            result: Tensor = SignSum.apply(scaled, self.seed, *sizes)  # type: ignore[no-untyped-call, unused-ignore]
            return result
        scaled = self.alphas * self.alpha_scale  # the entries of R_i are sqrt(k)
        places = self.bases.B[: math.prod(sizes), 0, 0]
        return torch.cat([scaled, -scaled])[places].view(sizes)


def signed_places(seed: int, count: int, size: int, device: torch.device) -> Tensor:
    """Return the coefficient i of each of ``size`` entries as i, or as i + ``count`` if its sign is negative, int32.

    Each ``count`` consecutive entries have every coefficient once, in a random order.
    """
    blocks = -(-size // count)
    result = torch.empty(blocks, count, dtype=torch.int32, device=device)
    if device.type == "meta":
        return result.flatten()[:size]
    step = max(1, CHUNK // count)
    for first in range(0, blocks, step):
        rows = torch.arange(first, min(first + step, blocks), device=device)
        words = grid_words(seed, stream("places of PRANC"), rows.new_zeros(1), rows, count)[0]
        order = (words >> 1).argsort(dim=1, stable=True)
        result[first : first + step] = order + count * (words & 1)
    return result.flatten()[:size]
