"""AdaLoRA as PEFT's ADALORA, both ways, and as a LoRA of the ranks that are kept."""

from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from randlora_pl.adapters import AdaLoRA, AdapterFile, LoRA
from randlora_pl.adapters.weights import WeightShape, exact_pattern, per_layer
from randlora_pl.interop.foreign.adapter import ExternalAdapter
from randlora_pl.interop.peft.files import PeftAdapter
from randlora_pl.interop.peft.tensors import Form, Part
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import misfit

_TINY = 1e-5
"""PEFT scales by lora_alpha / (init_r + 1e-5)."""

KEYS = frozenset(
    {
        *("r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("rank_pattern", "lora_alpha", "lora_dropout", "init_lora_weights"),
    }
)
"""Keys of PEFT's config that the import reads, or whose value changes nothing; PEFT ignores r."""


def _kept(tensors: dict[str, Tensor]) -> Tensor:
    """Return the ranks with an effect, now or after further training: bool (r)."""
    return tensors["mask"] | (tensors["E"] != 0)


def lora_of_kept(file: AdapterFile, parts: list[Part]) -> AdapterFile:
    """Return an AdaLoRA as the LoRA with the same update: the ranks that are kept, without layers that have none."""
    adapter = file.adapter
    assert isinstance(adapter, AdaLoRA)
    used = {part.path for part in parts if bool(_kept(part.tensors).any())}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    updates = tuple(f"{part.path}.delta." for part in parts)
    for part in parts:
        kept, own, layer = _kept(part.tensors), part.tensors, part.shape.layer
        if part.path not in used:
            continue
        if not bool(kept.any()):  # a block beside others: a rank of zeros keeps its place
            kept[0] = True
        prefix = f"{part.path}.delta.{part.block}." if part.block else f"{part.path}.delta."
        tensors[f"{prefix}A"] = (own["E"][:, None] * own["A"])[kept]
        tensors[f"{prefix}B"] = own["B"][:, kept]
        ranks[layer] = len(tensors[f"{prefix}A"])
        scaling = float(adapter.of(adapter.alpha, part.shape, 96.0)) / adapter.rank_of(part.shape)
        alphas[layer] = scaling * ranks[layer]
    lora = LoRA(
        rank=per_layer(ranks),  # type: ignore[arg-type]
        alpha=per_layer(alphas),
        dropout=adapter.dropout,
        qkv=adapter.qkv,
        seed=adapter.seed,
    )
    beside = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(updates)}
    config = {**file.config, "layers": {name: shape for name, shape in file.layers.items() if name in ranks}}
    return replace(file, adapter=lora, tensors=tensors | beside, config=config)


def adalora_form(adapter: AdaLoRA, parts: list[Part]) -> Form:
    """Convert AdaLoRA: PEFT has one rank and one alpha, so that E takes the ratio of the scalings."""
    ranks = [adapter.rank_of(part.shape) for part in parts]
    rank = max(ranks)
    alpha = float(rank) if isinstance(adapter.alpha, dict) or adapter.alpha <= 0 else float(adapter.alpha)
    tensors: dict[str, Tensor] = {}
    patterns: dict[str, list[bool]] = {}
    for part, own in zip(parts, ranks, strict=True):
        kept = _kept(part.tensors)
        scaling = float(adapter.of(adapter.alpha, part.shape, 96.0)) / own
        tensors[f"{part.path}.lora_A"] = part.tensors["A"][kept]
        tensors[f"{part.path}.lora_B"] = part.tensors["B"][:, kept]
        ratio = scaling * (rank + _TINY) / alpha
        tensors[f"{part.path}.lora_E"] = (part.tensors["E"][kept, None].double() * ratio).float()
        patterns[f"{part.path}.lora_E"] = [*kept.tolist(), *[False] * (rank - own)]
    config = {
        "peft_type": "ADALORA",
        "init_r": rank,
        "target_r": max(1, round(sum(map(sum, patterns.values())) / len(parts))),
        "total_step": 1,  # required; a further training sets its own
        "tinit": 0,
        "tfinal": 0,
        "deltaT": adapter.every,
        "beta1": adapter.beta1,
        "beta2": adapter.beta2,
        "orth_reg_weight": adapter.gamma,
        "rank_pattern": patterns,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": exact_pattern(part.path for part in parts),
        "init_lora_weights": True,
    }
    return config, tensors


class _Kinds(TypedDict, total=False):
    """Types of the keys that the import reads."""

    init_r: int
    target_r: int
    lora_alpha: float
    lora_dropout: float
    rank_pattern: dict[str, list[bool]] | None


def adalora(
    adapter: PeftAdapter, layers: dict[str, dict[str, Tensor]], shapes: dict[str, WeightShape]
) -> ExternalAdapter:
    """Convert PEFT's AdaLoRA; pruned ranks are zero, and stay so unless further training prunes others.

    Raises:
        UserError: A value of the config has another type, or a layer has other ranks than the config.
    """
    config: Any = adapter.config
    if wrong := misfit(config, _Kinds):
        raise UserError(f"{adapter.path}: {wrong} in its config; copy it again.")
    rank, target = config.get("init_r", 12), config.get("target_r", 8)
    ours: dict[str, dict[str, Tensor]] = {}
    for layer, own in layers.items():
        pattern = (config.get("rank_pattern") or {}).get(f"{layer}.lora_E", [True] * rank)
        kept = torch.tensor(pattern, dtype=torch.bool)
        a, b, e = (own[f"lora_{name}"] for name in "ABE")
        if len(kept) != rank or any(each.dim() != 2 for each in (a, b, e)) or len(e) != int(kept.sum()):
            raise UserError(
                f"{adapter.path}: lora_E of {layer} has shape {tuple(e.shape)}, and its config keeps {sum(pattern)} of "
                f"{rank} ranks; it is damaged, copy it again."
            )
        ours[layer] = {
            "A": _spread(a, kept, 0),
            "B": _spread(b, kept, 1),
            "E": _spread(e[:, 0] * (rank / (rank + _TINY)), kept, 0),
            "mask": kept,
        }
    alpha = float(config.get("lora_alpha", 8))
    made = AdaLoRA(
        rank=rank,
        target_rank=target if 1 <= target <= rank else None,
        alpha=alpha if alpha > 0 else float(rank),
        dropout=float(config.get("lora_dropout", 0.0)),
    )
    return ExternalAdapter(str(adapter.path), made, ours)


def _spread(tensor: Tensor, kept: Tensor, side: int) -> Tensor:
    """Return a tensor with zeros at the ranks of a side that are not kept; unchanged if the ranks do not fit."""
    if tensor.shape[side] != int(kept.sum()):
        return tensor
    shape = list(tensor.shape)
    shape[side] = len(kept)
    return tensor.new_zeros(shape).index_copy_(side, kept.nonzero()[:, 0], tensor)
