"""Frozen weights in few bits by torchao, which any task may ask for: the option ``quantize``."""

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from randlora_pl.adapters import Adapter, InjectionReport
from randlora_pl.adapters.sites import Blocks, find_sites, owners_of, reader_of
from randlora_pl.adapters.trained import hash_weights
from randlora_pl.utils.errors import UserError, first_line, log
from randlora_pl.utils.packed import stored_bytes
from randlora_pl.utils.text import byte_size

FORMS = ("int8", "int4")
"""Values of ``quantize`` that torchao packs; others are of bitsandbytes."""


@dataclass(frozen=True)
class Quantized:
    """Facts of a model that was quantized.

    Attributes:
        base_hash: `hash_weights` of the model before, which quantized weights no longer have.
        note: Quantized weights and bytes, as a line for the user.
    """

    base_hash: str
    note: str

    def complete(self, report: InjectionReport) -> None:
        """Add the facts to the report of an injection into the quantized model."""
        report.base_hash = self.base_hash
        report.notes.append(self.note)


def check_method(form: str | None, adapter: Adapter) -> None:
    """Refuse to quantize a model whose weights all train."""
    if form and not adapter.freezes:
        raise UserError(f"--model.quantize: {adapter.method()} trains every weight, which must be plain. Remove it.")


def quantize(model: nn.Module, form: str, device: torch.device, dtype: torch.dtype) -> Quantized:
    """Quantize the linear layers of a model's blocks in place; of heads, routers and shared weights none.

    Weights that their module does not use by calling a linear layer stay, such as those of packed attention.

    Args:
        model: A model without an adapter.
        form: One of `FORMS`.
        device: Device on which the layers are quantized, and stay.
        dtype: Dtype of the weights before, and of products outside autocast.

    Raises:
        UserError: torchao is missing, or cannot run this form on the device, or there is no such layer.
    """
    library, config = choose_config(form, device, dtype)
    blocks, owners = Blocks(model, find_sites(model)), owners_of(model)
    weights, base_hash = blocks.weights(), hash_weights(model)
    before = sum(map(stored_bytes, model.parameters()))
    left = dict(weights)
    for path in dict.fromkeys(site.path for site in blocks.sites if blocks.has(site)):
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear or layer.in_features == 1 or reader_of(model, path) is not None:
            continue
        if len(owners[id(layer.weight)]) == 1:
            library.quantize_(layer.to(device, dtype), config, lambda *_: True)
            vars(layer).pop("extra_repr", None)  # torchao's, which cannot be pickled
            left.pop(f"{path}.weight")
    done = len(weights) - len(left)
    if not done:
        raise UserError(f"--model.quantize finds no linear layer in the blocks of {type(model).__name__}. Remove it.")
    sizes = f"{byte_size(before)} -> {byte_size(sum(map(stored_bytes, model.parameters())))} of the model"
    rest = f"; not quantized: {', '.join(list(left)[:2])}{' ...' * (len(left) > 2)}" if left else ""
    return Quantized(base_hash, f"{form} (torchao): {done} of {len(weights)} weights of the blocks, {sizes}{rest}")


def choose_config(form: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the module ``torchao.quantization`` and its first config of a form that a layer can run with.

    Raises:
        UserError: torchao is missing, or none runs; the message has its reasons.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError(f"--model.quantize {form} needs torchao: pip install '.[torchao]' in the checkout")
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # on a CPU torchao warns that its kernels for GPUs do not load
    try:
        import torchao.quantization as library
    finally:
        logging.disable(level)
    configs: list[Any] = [library.Int8WeightOnlyConfig()]
    if form == "int4":
        configs = [library.Int4WeightOnlyConfig()]
        formats = type(configs[0].int4_packing_format)
        configs += [library.Int4WeightOnlyConfig(int4_packing_format=each) for each in formats]
    reasons: list[str] = []
    for config in configs:
        probe: Any = nn.Linear(256, 256, bias=False, device=device, dtype=dtype)
        try:
            library.quantize_(probe, config, lambda *_: True)
            probe(torch.ones(1, 256, device=device, dtype=dtype))
            probe.weight.dequantize()
        except Exception as error:  # each format has errors of its own, for packages, devices and dtypes
            reasons.append(first_line(error))
        else:
            return library, config
    raise UserError(
        f"--model.quantize {form}: torchao cannot run it on {device} in {str(dtype).removeprefix('torch.')} "
        f"({'; '.join(list(dict.fromkeys(reasons))[:3])}). Use int8, or remove the option."
    )


def usable(form: str | None, source: object) -> str | None:
    """Return the ``quantize`` of a file; with a warning None if torchao is missing here or cannot run it on a CPU."""
    if form in FORMS:
        try:
            choose_config(form, torch.device("cpu"), torch.float32)
        except UserError as error:
            log.warning("%s: the base model is loaded without quantization. %s", source, error)
            return None
    return form
