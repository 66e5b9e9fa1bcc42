"""Methods that PEFT has with the same equation and other names for the tensors: one `Translation` each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from randlora_pl.adapters import OFT, AdaLoRA, Adapter, HiRA, SHiRA
from randlora_pl.adapters.weights import WeightShape, exact_pattern
from randlora_pl.interop.foreign.adapter import ExternalAdapter
from randlora_pl.interop.peft.adalora import KEYS, adalora, adalora_form
from randlora_pl.interop.peft.files import PeftAdapter
from randlora_pl.interop.peft.relative import hira, hira_form, oft, oft_form
from randlora_pl.interop.peft.tensors import Form, Part
from randlora_pl.utils.errors import UserError

Layers = dict[str, dict[str, Tensor]]
Shapes = dict[str, WeightShape]


@dataclass(frozen=True)
class Translation:
    """A method in PEFT's form and back.

    Attributes:
        method: Our method.
        keys: Keys of PEFT's config that the import reads, or whose value changes nothing.
        names: PEFT's tensors of a layer.
        export: Function that returns PEFT's config and tensors from the adapter and its parts.
        translate: Function that returns our adapter from PEFT's, its tensors by our layers, and their shapes.
    """

    method: type[Adapter]
    keys: frozenset[str]
    names: tuple[str, ...]
    export: Callable[[Any, list[Part]], Form]
    translate: Callable[[PeftAdapter, Layers, Shapes], ExternalAdapter]


def one_rank(name: str, ranks: list[int]) -> int:
    """Return the rank of all layers.

    Raises:
        UserError: Layers differ, which PEFT's method of this name cannot represent.
    """
    if len(different := sorted(set(ranks))) > 1:
        raise UserError(f"its layers have ranks {' and '.join(map(str, different))}; PEFT's {name} has one rank")
    return ranks[0]


def shira_form(adapter: SHiRA, parts: list[Part]) -> Form:
    """Convert SHiRA: PEFT stores the rows and columns of the places.

    Raises:
        UserError: Layers have different ranks.
    """
    tensors: dict[str, Tensor] = {}
    for part in parts:
        places, width = part.tensors["places"], part.shape.in_features
        tensors[f"{part.path}.shira_weight"] = part.tensors["values"]
        tensors[f"{part.path}.shira_indices"] = torch.stack([places // width, places % width]).to(torch.int32)
    config = {
        "peft_type": "SHIRA",
        "r": one_rank("SHiRA", [adapter.rank_of(part.shape) for part in parts]),
        "mask_type": "random",
        "random_seed": None,
        "target_modules": exact_pattern(part.path for part in parts),
        "init_weights": True,
    }
    return config, tensors


def shira(adapter: PeftAdapter, layers: Layers, shapes: Shapes) -> ExternalAdapter:
    """Convert PEFT's SHiRA, with the places of any mask.

    Raises:
        UserError: Places are outside the weight, or not distinct.
    """
    ours: Layers = {}
    for layer, own in layers.items():
        shape, indices = shapes[layer], own["shira_indices"].long()
        sides = torch.tensor([[shape.out_features], [shape.in_features]])
        good = indices.dim() == 2 and len(indices) == 2 and bool(((indices >= 0) & (indices < sides)).all())
        places, order = (indices[0] * shape.in_features + indices[1]).sort() if good else (indices, indices)
        if not good or not bool((places[1:] > places[:-1]).all()) or len(places) != len(own["shira_weight"]):
            raise UserError(
                f"{adapter.path}: shira_indices of {layer} are not distinct places in {shape.out_features} x "
                f"{shape.in_features}, one for each value; it belongs to another model, or is damaged."
            )
        ours[layer] = {"values": own["shira_weight"][order], "places": places}
    return ExternalAdapter(str(adapter.path), SHiRA(rank=int(adapter.config["r"])), ours)


TRANSLATIONS: dict[str, Translation] = {
    "ADALORA": Translation(AdaLoRA, KEYS, ("lora_A", "lora_B", "lora_E"), adalora_form, adalora),
    "HIRA": Translation(HiRA, frozenset({"r", "rank_pattern", "hira_dropout"}), ("hira_A", "hira_B"), hira_form, hira),
    "OFT": Translation(
        OFT,
        frozenset(
            {
                *("r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"),
                *("module_dropout", "eps"),  # without effect outside of training and of the refused coft
            }
        ),
        ("oft_R.weight",),
        oft_form,
        oft,
    ),
    "SHIRA": Translation(
        SHiRA,
        frozenset({"r", "mask_type", "random_seed"}),
        ("shira_weight", "shira_indices"),
        shira_form,
        shira,
    ),
}
"""The methods, by PEFT's name."""
