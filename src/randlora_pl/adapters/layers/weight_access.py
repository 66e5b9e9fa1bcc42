"""Access to weights as (out, in) matrices, for transposed, four-dimensional, quantized and fused (q, k, v) storage.

Classes of libraries that are not imported here are recognized by their properties. ``Conv1D`` of transformers (GPT-2)
is a module of exactly this class name whose weight is a matrix (in, out) and whose bias has ``out`` entries:
``y = x W + b``. A quantized layer (``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes) is a subclass of
``nn.Linear`` with its own forward, and has one of these names or an integer weight.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.adapters.kernels.randlora_linear import without_autocast

_QUANTIZED_CLASSES = ("Linear4bit", "Linear8bitLt")


def is_conv1d(module: nn.Module) -> bool:
    """Return True if a module is transformers' ``Conv1D``, adapted or not."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    named = getattr(module, "plain_class", type(module)).__name__ == "Conv1D"
    return named and weight is not None and bias is not None and weight.dim() == 2 and bias.shape == weight.shape[1:]


def is_quantized(module: nn.Module) -> bool:
    """Return True if a module is a linear layer with a packed weight, which only its own forward can use."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    weight = module._parameters.get("weight")
    named = any(kind.__name__ in _QUANTIZED_CLASSES for kind in type(module).__mro__)
    return weight is not None and (named or not weight.is_floating_point())


def out_and_in(module: nn.Module) -> tuple[int, int] | None:
    """Return the output and input size of a linear layer, or of a convolution at one position; otherwise None."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
    if is_conv1d(module):
        in_features, out_features = module._parameters["weight"].shape  # type: ignore[union-attr]
        return out_features, in_features
    return None


def weight_of(module: nn.Module, values: bool = True) -> Tensor:
    """Return the weight of a linear, attention or convolution layer, (out, in); a view unless it is quantized.

    Args:
        module: Layer with the weight.
        values: If False, do not dequantize; return an empty tensor of the same shape and device.
    """
    if is_quantized(module):
        if values:
            return dequantized(module)
        assert isinstance(module, nn.Linear)
        return torch.empty((), device=module.weight.device).expand(module.out_features, module.in_features)
    weight: Tensor = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight.flatten(1)


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """Return the weight of a quantized layer, (out, in), in the layer's compute dtype if it has one.

    bitsandbytes unpacks the weights of its own classes, except layouts for a CPU's kernels; it is found by the class,
    because it is not a dependency. Of any other class these are the outputs of its forward for the unit vectors, which
    take an (in, in) matrix and ``2 in^2 out`` operations.
    """
    assert isinstance(module, nn.Linear)
    dtype = getattr(module, "compute_dtype", None) or (torch.float32 if module.bias is None else module.bias.dtype)
    kind = next((kind for kind in type(module).__mro__ if kind.__name__ in _QUANTIZED_CLASSES), nn.Linear)
    functional: Any = getattr(sys.modules.get(kind.__module__.partition(".")[0]), "functional", None)
    weight: Any = module.weight
    values: Tensor | None = None
    if kind.__name__ == "Linear4bit" and functional is not None:
        state: Any = getattr(weight, "quant_state", None)
        if state is not None and not getattr(state, "packing_format_for_cpu", False):
            values = functional.dequantize_4bit(weight.data, state)
    elif kind.__name__ == "Linear8bitLt" and functional is not None:
        scales: Any = getattr(weight, "SCB", None)
        scales = module.state.SCB if scales is None else scales  # type: ignore[union-attr]  # the first forward moves them there
        if scales is not None and weight.dtype == torch.int8:
            values = functional.int8_vectorwise_dequant(weight.data, scales)
    return _of_unit_vectors(module, dtype) if values is None else values.to(dtype)


def _of_unit_vectors(module: nn.Linear, dtype: torch.dtype) -> Tensor:
    unit = torch.eye(module.in_features, device=module.weight.device, dtype=dtype)
    kind = getattr(module, "plain_class", type(module))
    before = dict(vars(module))
    with without_autocast(unit):
        rows: Tensor = kind.forward(module, unit)
    vars(module).update(before)  # bitsandbytes stores the dtype of the first input, which should not be this one
    return (rows if module.bias is None else rows - module.bias).T


BLOCKS = ("q", "k", "v")


def row_blocks(model: nn.Module, path: str) -> dict[str, tuple[int, int]]:
    """Return the first row and last row + 1 of q, k and v in a fused weight; empty if they are unknown.

    They are thirds if the weight has three rows per column. With fewer heads for k and v than for q (grouped-query
    attention, Phi-3's ``qkv_proj``; one head in GPTBigCode), k and v have ``head_dim * num_key_value_heads`` rows each,
    attributes of the parent module in transformers. Weights with interleaved heads (q, k and v of one head after the
    other) have no such blocks.

    Args:
        model: Model that contains the module.
        path: Path of the module with the weight: a linear layer of any kind, or ``nn.MultiheadAttention``.
    """
    module, above = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
    out_features, in_features = weight_of(module, values=False).shape
    name = type(above).__name__
    if name == "CodeGenAttention" or (name == "GPTBigCodeAttention" and not above.multi_query):
        return {}  # split by heads, or groups of heads, first: also with three rows per column
    size, heads = getattr(above, "head_dim", None), getattr(above, "num_key_value_heads", None)
    heads = getattr(above, "kv_heads", None) if heads is None else heads
    few = size * heads if isinstance(size, int) and isinstance(heads, int) else 0
    if few and out_features > 2 * few:
        many = out_features - 2 * few
    elif out_features == 3 * in_features:
        many = few = in_features
    else:
        return {}
    return {"q": (0, many), "k": (many, many + few), "v": (many + few, out_features)}
