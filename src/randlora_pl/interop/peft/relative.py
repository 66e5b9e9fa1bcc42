"""HiRA and OFT, whose updates are relative to the frozen weight, in PEFT's form and back.

PEFT's OFT has the rotation R = (I + Q) (I - Q)^-1 as a series if ``use_cayley_neumann`` is set, and its inverse
(I - Q) (I + Q)^-1 if not. So one file means two rotations, and Q is negated here for the exact form.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from randlora_pl.adapters import OFT, HiRA
from randlora_pl.adapters.weights import WeightShape, exact_pattern, per_layer
from randlora_pl.interop.foreign.adapter import ExternalAdapter
from randlora_pl.interop.peft.files import PeftAdapter
from randlora_pl.interop.peft.tensors import Form, Part
from randlora_pl.utils.errors import UserError

_SERIES = (0, 18)
"""First version of PEFT with today's series."""


def hira_form(adapter: HiRA, parts: list[Part]) -> Form:
    """Convert HiRA: PEFT has the same two tensors, but one rank, which zeros fill up; 0.21 ignores its rank_pattern."""
    rank = max(adapter.rank_of(part.shape) for part in parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        a, b = part.tensors["A"], part.tensors["B"]
        more = rank - len(a)
        tensors[f"{part.path}.hira_A"] = torch.cat([a, a.new_zeros(more, a.shape[1])])
        tensors[f"{part.path}.hira_B"] = torch.cat([b, b.new_zeros(len(b), more)], dim=1)
    config = {
        "peft_type": "HIRA",
        "r": rank,
        "rank_pattern": {},
        "hira_dropout": adapter.dropout,
        "target_modules": exact_pattern(part.path for part in parts),
        "exclude_modules": None,
        "init_weights": True,
    }
    return config, tensors


def hira(
    adapter: PeftAdapter, layers: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, WeightShape]
) -> ExternalAdapter:
    """Convert PEFT's HiRA; ranks come from the tensors."""
    ours = {layer: {name: own[f"hira_{name}"].flatten(1) for name in "AB"} for layer, own in layers.items()}
    ranks = per_layer({layer: len(own["A"]) for layer, own in ours.items()})
    dropout = float(adapter.config.get("hira_dropout") or 0.0)
    return ExternalAdapter(str(adapter.path), HiRA(rank=ranks, dropout=dropout), ours)  # type: ignore[arg-type]


def oft_form(adapter: OFT, parts: list[Part]) -> Form:
    """Convert OFT: PEFT has one size of the blocks, or one number of them, from which it finds each layer's.

    Raises:
        UserError: PEFT finds other sizes.
    """
    terms = adapter.neumann_terms
    number, size = _common_size({(part.shape.in_features, adapter.block_of(part.shape)) for part in parts})
    config = {
        "peft_type": "OFT",
        "peft_version": ".".join(map(str, _SERIES)) + ".0",
        "r": number,
        "oft_block_size": size,
        "module_dropout": 0.0,
        "coft": False,
        "block_share": False,
        "use_cayley_neumann": terms is not None,
        "num_cayley_neumann_terms": terms or 5,
        "target_modules": exact_pattern(part.path for part in parts),
        "exclude_modules": None,
        "init_weights": True,
    }
    sign = -1 if terms is None else 1
    return config, {f"{part.path}.oft_R.weight": sign * part.tensors["Q"] for part in parts}


def _common_size(pairs: set[tuple[int, int]]) -> tuple[int, int]:
    """Return PEFT's number and size of blocks, of which one is 0, for inputs and blocks of layers.

    Raises:
        UserError: None fits all layers.
    """
    blocks = sorted({block for _, block in pairs})
    divisors = {side: [size for size in range(1, side + 1) if side % size == 0] for side, _ in pairs}
    for size in (*blocks, *range(2, max(divisors) + 1)):
        if all(_adjusted(divisors[side], size) == block for side, block in pairs):
            return 0, size
    if len(numbers := {side // block for side, block in pairs}) == 1:
        return numbers.pop(), 0
    raise UserError(f"its layers have blocks of {' and '.join(map(str, blocks))}; PEFT finds others for one size")


def _adjusted(divisors: list[int], size: int) -> int:
    """Return the nearest divisor to a size, the smaller one of two, as PEFT does."""
    return min(divisors, key=lambda divisor: (abs(divisor - size), divisor))


def oft(
    adapter: PeftAdapter, layers: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, WeightShape]
) -> ExternalAdapter:
    """Convert PEFT's OFT; sizes of blocks come from the tensors.

    Raises:
        UserError: The series is of an old version of PEFT or too short, or a tensor has a different shape.
    """
    terms = _terms(adapter)
    ours, blocks = {}, {}
    for layer, own in layers.items():
        weight, side = own["oft_R"], shapes[layer].in_features
        block = (1 + math.isqrt(1 + 8 * weight.shape[-1])) // 2
        if weight.dim() != 2 or (len(weight) * block, block * (block - 1) // 2) != (side, weight.shape[1]):
            raise UserError(
                f"{adapter.path}: oft_R of {layer} has shape {tuple(weight.shape)}, which does not fit its "
                f"{side} inputs; it belongs to another model, or is damaged."
            )
        ours[layer], blocks[layer] = {"Q": -weight if terms is None else weight}, block
    return ExternalAdapter(str(adapter.path), OFT(block=per_layer(blocks), neumann_terms=terms), ours)  # type: ignore[arg-type]


def _terms(adapter: PeftAdapter) -> int | None:
    """Return the number of terms of PEFT's series, or None for the exact inverse."""
    config = adapter.config
    if not config.get("use_cayley_neumann", True):
        return None
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    terms = config.get("num_cayley_neumann_terms", 5)
    if version is None or (int(version[1]), int(version[2])) < _SERIES or type(terms) is not int or terms < 3:
        raise UserError(
            f"{adapter.path}: the series of its rotations ({terms} terms, peft_version {config.get('peft_version')}) "
            "has no counterpart here. Merge it with the PEFT that trained it instead: model.merge_and_unload()"
        )
    return max(terms, 4)  # PEFT's sum of 3 terms is the same
