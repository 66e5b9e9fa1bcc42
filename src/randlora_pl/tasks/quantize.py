"""Frozen weights in few bits by torchao, which any task may ask for: the option ``quantize``."""

import importlib.util
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from randlora_pl.adapters import Adapter
from randlora_pl.adapters.sites import Blocks, find_sites, owners_of, reader_of
from randlora_pl.adapters.trained import PLAIN_HASH, hash_weights
from randlora_pl.utils.errors import UserError, first_line, install
from randlora_pl.utils.packed import stored_bytes
from randlora_pl.utils.text import byte_size

FORMS = ("int8", "int4")
"""Values of ``quantize`` that torchao packs; others are of bitsandbytes."""


def check_quantize(form: str | None, adapter: Adapter) -> None:
    """Refuse a method that needs whole weights, and a missing package, before anything is loaded."""
    if form and (not adapter.freezes or any(each.holds_factors for each in adapter.leaves())):
        what = f"{adapter.method()} needs room for weights of full size"
        raise UserError(f"--model.quantize {form}: {what}. Choose RandLoRA, or remove the option.")
    if form in FORMS and importlib.util.find_spec("torchao") is None:
        raise UserError(f"--model.quantize {form} needs torchao: {install('torchao')}")


def build_quantized(
    build: Callable[[], nn.Module], form: str | None, device: torch.device, dtype: str
) -> tuple[nn.Module, list[str]]:
    """Build a model with linear layers of its blocks quantized on a device, from weights of this dtype.

    Heads, routers, shared weights and weights that are not used by calling a linear layer stay, as in packed attention.

    Returns:
        The model, and notes for the user. It is as it was built if the form is not of torchao.
    """
    if form is None or form not in FORMS:
        return build(), []
    _pack(nn.Linear(256, 256), form, device, dtype)  # refuses the form before the model is loaded
    model = build()
    blocks, owners = Blocks(model, find_sites(model)), owners_of(model)
    left = blocks.weights()
    count, before = len(left), sum(map(stored_bytes, model.parameters()))
    vars(model)[PLAIN_HASH] = hash_weights(model)
    for path in dict.fromkeys(site.path for site in blocks.sites if blocks.has(site)):
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear or layer.in_features == 1 or reader_of(model, path) is not None:
            continue
        if len(owners[id(layer.weight)]) == 1:
            _pack(layer, form, device, dtype)
            left.pop(f"{path}.weight")
    if len(left) == count:
        raise UserError(f"--model.quantize finds no linear layer in the blocks of {type(model).__name__}. Remove it.")
    sizes = f"{byte_size(before)} -> {byte_size(sum(map(stored_bytes, model.parameters())))} of the model"
    rest = f"; not quantized: {', '.join(list(left)[:2])}{' ...' * (len(left) > 2)}" if left else ""
    return model, [f"{form} (torchao): {count - len(left)} of {count} weights of the blocks, {sizes}{rest}"]


def _pack(layer: nn.Linear, form: str, device: torch.device, dtype: str) -> None:
    """Quantize the weight of a layer, or refuse with torchao's reason; a bias stays, because it may train."""
    for name in ("torchao", "torch.utils._pytree"):  # on a CPU they warn of kernels for GPUs
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        layer.weight.data = weight = layer.weight.data.to(device, getattr(torch, dtype))
        quantize_(layer, Int8WeightOnlyConfig() if form == "int8" else Int4WeightOnlyConfig(), lambda *_: True)
        F.linear(torch.ones_like(weight[:1]), layer.weight)
        layer.weight.dequantize()
    except Exception as error:  # of any kind: for packages, devices, dtypes and sizes
        raise UserError(
            f"--model.quantize {form}: torchao cannot run {layer.out_features} x {layer.in_features} on {device} in "
            f"{dtype} ({first_line(error)}). {'Use int8, or remove' if form == 'int4' else 'Remove'} the option."
        ) from error
    vars(layer).pop("extra_repr", None)  # torchao's, which cannot be pickled
