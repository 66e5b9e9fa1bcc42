"""LoRA of convolutions in PEFT's form: A is a convolution with the layer's kernel, B one of 1 x 1.

PEFT's A has no groups, dilation or padding mode, so such layers cannot be exported.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from randlora_pl.adapters.layers.built import has_own_forward
from randlora_pl.utils.errors import UserError


def plain_convolution(layer: nn.Module) -> bool:
    """Return True if PEFT's LoRA of a layer is a matrix (out, in * height * width) added to its weight."""
    if not isinstance(layer, nn.Conv2d) or has_own_forward(type(layer)):
        return False
    return layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


def with_kernels(
    tensors: Mapping[str, Tensor], paths: Iterable[str], model: nn.Module, lora: bool
) -> dict[str, Tensor]:
    """Return PEFT's tensors with four-dimensional factors for convolutions.

    Args:
        tensors: Tensors in PEFT's form, all factors as matrices.
        paths: Paths of the adapted layers.
        model: Base model.
        lora: True for plain LoRA.

    Raises:
        UserError: PEFT cannot represent a convolution.
    """
    found = dict(tensors)
    for path in paths:
        layer = model.get_submodule(path)
        if not isinstance(layer, nn.Conv2d):
            continue
        if not lora:
            raise UserError(f"{path} is a convolution, which PEFT adapts with LoRA only")
        if not plain_convolution(layer):
            raise UserError(f"PEFT's LoRA has no groups, dilation or padding mode for a convolution such as {path}")
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        found[a] = found[a].view(-1, *layer.weight.shape[1:])
        found[b] = found[b][..., None, None]
    return found
