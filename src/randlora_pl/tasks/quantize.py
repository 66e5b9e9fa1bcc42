"""Frozen weights in few bits by torchao, which any task may ask for: the option ``quantize``."""

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from randlora_pl.adapters.sites import Blocks, find_sites, owners_of, reader_of
from randlora_pl.adapters.trained import hash_weights
from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.packed import stored_bytes
from randlora_pl.utils.text import byte_size

FORMS = ("int8", "int4")
"""Values of ``quantize`` that torchao packs; others are of bitsandbytes."""


def quantize(model: nn.Module, form: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, str] | None:
    """Quantize the linear layers of a model's blocks in place, on a device, from weights of this dtype.

    Heads, routers, shared weights and weights that are not used by calling a linear layer stay, as in packed attention.

    Returns:
        `hash_weights` of the model before, which quantized weights no longer have, and a note for the user; None, and
        the model as it was, if the form is not of torchao.
    """
    if form is None or form not in FORMS:
        return None
    library, config = load_library(form, device, dtype)
    blocks, owners = Blocks(model, find_sites(model)), owners_of(model)
    left, base_hash = blocks.weights(), hash_weights(model)
    count, before = len(left), sum(map(stored_bytes, model.parameters()))
    for path in dict.fromkeys(site.path for site in blocks.sites if blocks.has(site)):
        layer = model.get_submodule(path)
        called = type(layer) is nn.Linear and layer.in_features > 1 and reader_of(model, path) is None
        if called and len(owners[id(layer.weight)]) == 1:
            library.quantize_(layer.to(device, dtype), config, lambda *_: True)
            vars(layer).pop("extra_repr", None)  # torchao's, which cannot be pickled
            left.pop(f"{path}.weight")
    if len(left) == count:
        raise UserError(f"--model.quantize finds no linear layer in the blocks of {type(model).__name__}. Remove it.")
    sizes = f"{byte_size(before)} -> {byte_size(sum(map(stored_bytes, model.parameters())))} of the model"
    rest = f"; not quantized: {', '.join(list(left)[:2])}{' ...' * (len(left) > 2)}" if left else ""
    return base_hash, f"{form} (torchao): {count - len(left)} of {count} weights of the blocks, {sizes}{rest}"


def load_library(form: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return ``torchao.quantization`` and its config of a form, or refuse with its reason if no layer runs with it."""
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"--model.quantize {form} needs torchao: pip install '.[torchao]' in the checkout")
    for name in ("torchao", "torch.utils._pytree"):  # on a CPU they warn of kernels for GPUs
        logging.getLogger(name).setLevel(logging.ERROR)
    import torchao.quantization as library

    config = library.Int8WeightOnlyConfig() if form == "int8" else library.Int4WeightOnlyConfig()
    probe = nn.Linear(256, 256, bias=False, device=device, dtype=dtype)
    try:
        library.quantize_(probe, config, lambda *_: True)
        probe(torch.ones(1, 256, device=device, dtype=dtype))
        probe.weight.dequantize()
    except Exception as error:  # of any kind: for packages, devices and dtypes
        raise UserError(
            f"--model.quantize {form}: torchao cannot run it on {device} in {dtype} ({first_line(error)}). Use int8, "
            "or remove the option."
        ) from error
    return library, config
