"""Weights as (out, in) matrices, however a layer stores them: turned, of four dimensions, or quantised and packed.

Both kinds come from libraries that are not imported here, so they are known by what they are. ``Conv1D`` of
transformers (GPT-2) is a module of exactly this class name whose weight is a matrix (in, out) and whose bias has
``out`` entries: ``y = x W + b``. A quantised layer (``Linear4bit`` and ``Linear8bitLt`` of bitsandbytes) is a subclass
of ``nn.Linear`` with a forward of its own, and has one of these names or a weight of integers.
"""

import math

import torch
from torch import Tensor, nn

from randlora_pl.adapters.kernels.randlora_linear import without_autocast

_QUANTIZED_CLASSES = ("Linear4bit", "Linear8bitLt")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, adapted or not."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    named = getattr(module, "plain_class", type(module)).__name__ == "Conv1D"
    return named and weight is not None and bias is not None and weight.dim() == 2 and bias.shape == weight.shape[1:]


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is packed, so that only its own forward can use it."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    weight = module._parameters.get("weight")
    named = any(kind.__name__ in _QUANTIZED_CLASSES for kind in type(module).__mro__)
    return weight is not None and (named or not weight.is_floating_point())


def out_and_in(module: nn.Module) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer of any kind, or of a convolution at one place; None for other modules."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels // module.groups * math.prod(module.kernel_size)
    if is_conv1d(module):
        in_features, out_features = module._parameters["weight"].shape  # type: ignore[union-attr]
        return out_features, in_features
    return None


def weight_of(module: nn.Module, values: bool = True) -> Tensor:
    """The weight of a linear, attention or convolution layer, (out, in); a view where it is stored as numbers.

    Args:
        module: The layer.
        values: Whether the entries are needed. Without them a quantised weight costs nothing, and only shape and
            device are its own.
    """
    if is_quantized(module):
        return dequantized(module) if values else _only_shape(module)
    weight: Tensor = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight  # type: ignore[assignment]
    return weight.T if is_conv1d(module) else weight.flatten(1)


def _only_shape(module: nn.Module) -> Tensor:
    shape = out_and_in(module)
    assert shape is not None
    device = module._parameters["weight"].device  # type: ignore[union-attr]
    return torch.empty((), device=device).expand(shape)


@torch.no_grad()
def dequantized(module: nn.Module) -> Tensor:
    """The weight that a quantised layer's own forward multiplies with, (out, in): what it gives for the unit vectors.

    In the dtype that the layer computes in, as far as it says.
    """
    assert isinstance(module, nn.Linear)
    dtype = getattr(module, "compute_dtype", None) or (torch.float32 if module.bias is None else module.bias.dtype)
    unit = torch.eye(module.in_features, device=module.weight.device, dtype=dtype)
    kind = getattr(module, "plain_class", type(module))
    before = dict(vars(module))
    with without_autocast(unit):
        rows: Tensor = kind.forward(module, unit)
    vars(module).update(before)  # bitsandbytes takes its dtype from the first input, which this is not to be
    return (rows if module.bias is None else rows - module.bias).T
