"""Adapters whose update is a product of two thin factors, as a LoRA that has these factors trained."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from randlora_pl.adapters import AdapterFile, LoRA, LoRAXS, PiSSA, adapted_layers
from randlora_pl.adapters.base import FactoredDelta
from randlora_pl.adapters.layers.adapted import RowBlocks
from randlora_pl.interop.foreign.adapter import per_layer

Factored = PiSSA | LoRAXS
"""Methods whose factors follow from what is trained and the weights of the base model."""


@torch.no_grad()
def lora_of(file: AdapterFile, adapted: nn.Module) -> AdapterFile:
    """Return an adapter as the LoRA with the same update: rank 2r for PiSSA, r for LoRA-XS, and a scaling of one.

    Args:
        file: Adapter of a method in `Factored`.
        adapted: Its base model with the adapter, not merged.
    """
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(adapted).items():
        whole = path if layer.weight_name == "weight" else f"{path}.in_proj".lstrip(".")
        blocks = layer.delta.blocks() if isinstance(layer.delta, RowBlocks) else {"": layer.delta}
        for block, delta in blocks.items():
            if not isinstance(delta, FactoredDelta):  # an attention layer that calls its projection
                continue
            prefix = f"{path}.delta.{block}".strip(".") + "."
            tensors[f"{prefix}B"], tensors[f"{prefix}A"] = (factor.contiguous() for factor in delta.factors())
            ranks[f"{path}.{block}".lstrip(".") if block else whole] = len(tensors[f"{prefix}A"])
    updates = tuple(name[:-1] for name in tensors)
    own = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(updates)}
    rank = per_layer(ranks)
    alpha = {pattern: float(value) for pattern, value in rank.items()} if isinstance(rank, dict) else float(rank)
    lora = LoRA(rank, alpha, dropout=file.adapter.dropout, qkv=file.adapter.qkv, seed=file.adapter.seed)  # type: ignore[arg-type]
    return replace(file, adapter=lora, tensors=tensors | own)
