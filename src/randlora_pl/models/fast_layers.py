"""Layers of a backbone that run as one kernel on a GPU, and as the library wrote them on a CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from randlora_pl.models.activation import quick_gelu
from randlora_pl.models.blocks import repeated_blocks
from randlora_pl.utils.device import on_cuda

aten: Any = torch.ops.aten
_QUICK_GELUS = ("open_clip.transformer.QuickGELU", "timm.layers.activations.QuickGELU")
_SAME_DTYPE = ("open_clip.transformer.LayerNorm", "open_clip.transformer.LayerNormFp32")  # output as input
_CAUSAL = ("open_clip.model.CLIP", "open_clip.transformer.TextTransformer")
_RMS_NORMS = tuple(
    f"transformers.models.{family.lower()}.modeling_{family.lower()}.{family}RMSNorm"
    for family in ("Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "SmolLM3")
)  # of one and the same code; Gemma's and OLMo's differ
_NORMS = (*_SAME_DTYPE, "timm.layers.norm.LayerNorm", "torch.nn.modules.normalization.LayerNorm")


class FastLayer(nn.Module):
    """Base of layers that replace the class of another layer in place."""

    plain: type[nn.Module]

    @classmethod
    def replace(cls, layer: nn.Module) -> None:
        """Replace the class of a layer; parameters, hooks and references stay."""
        layer.plain = type(layer)  # type: ignore[assignment]
        layer.__class__ = cls


class FastQuickGELU(FastLayer):
    """QuickGELU in one kernel on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise; compiled code fuses the library's own operations."""
        if on_cuda(x) and not torch.compiler.is_compiling():
            return quick_gelu(x)
        result: Tensor = self.plain.forward(self, x)
        return result


class FastLayerNorm(FastLayer, nn.LayerNorm):
    """LayerNorm that reads and writes autocast's dtype on a GPU, where its kernel sums in float32.

    CUDA's autocast would cast the input to float32 and keep that copy for the backward pass, and the next product would
    cast the output back. Trainable parameters stay float32 and get float32 gradients.
    """

    in_block: bool
    _cast: tuple[Tensor, Tensor | None, Any, list[Tensor | None]] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimensions; outside blocks a float32 input is normalized as the library does."""
        kind = x.device.type
        if on_cuda(x) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if self.in_block or x.dtype == dtype:
                weight, bias = self._parameters_as(dtype)
                with torch.autocast(kind, enabled=False):
                    return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)
        result: Tensor = self.plain.forward(self, x)
        return result

    def _parameters_as(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return weight and bias in a dtype; frozen ones are cast once and again when they change."""
        both: list[Tensor | None] = [self.weight, self.bias]
        changes = (p is not None and (p.requires_grad or p.is_inference()) for p in both)  # the latter count none
        if torch.compiler.is_compiling() or any(changes):
            return [None if p is None else p.to(dtype) for p in both]
        key = (dtype, [None if p is None else (p.device, p._version) for p in both])
        if self._cast is None or self._cast[0] is not both[0] or self._cast[1] is not both[1] or self._cast[2] != key:
            with torch.inference_mode(False):  # training keeps the copies that a validation may have made
                self._cast = (self.weight, self.bias, key, [None if p is None else p.to(dtype) for p in both])
        return self._cast[3]


class FastRMSNorm(FastLayer):
    """RMSNorm of a decoder in one kernel on a GPU (PyTorch 2.9 and later), which sums in float32 and rounds once.

    Written out, it is seven kernels, and keeps the input in float32 for the backward pass.
    """

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalize the last dimension; compiled code fuses the library's own operations."""
        fused = on_cuda(hidden_states) and not torch.compiler.is_compiling() and hasattr(aten, "_fused_rms_norm")
        if fused and hidden_states.dtype == self.weight.dtype:
            with torch.autocast(hidden_states.device.type, enabled=False):
                return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        result: Tensor = self.plain.forward(self, hidden_states)
        return result


def use_fast_layers(model: nn.Module) -> int:
    """Let LayerNorm, RMSNorm and QuickGELU of a backbone run as single kernels on a GPU, in place.

    Adapted attention of open_clip's text towers gets no mask on a GPU, but computes causal attention.

    On a CPU they compute what the library does, bit for bit. The stream that blocks add to keeps its dtype: float32 in
    timm, the dtype of the patch or token embeddings in open_clip. LayerNorm of language models stays as it is.

    Examples:
        >>> use_fast_layers(load_clip("tiny").model)
        23

    Returns:
        Number of layers that were changed.
    """
    blocks = [block for block in repeated_blocks(model).values() if not _name(block).startswith("transformers.")]
    inside = {id(layer) for block in blocks for layer in block.modules()}
    count = 0
    for layer in model.modules():
        name = _name(layer)
        if name in _CAUSAL and getattr(layer, "attn_mask", None) is not None:
            for attention in layer.transformer.modules():  # type: ignore[union-attr]
                if isinstance(attention, nn.MultiheadAttention):
                    attention.causal = True  # type: ignore[assignment]
        if name in _QUICK_GELUS:
            FastQuickGELU.replace(layer)
        elif name in _RMS_NORMS:
            FastRMSNorm.replace(layer)
        elif name in _SAME_DTYPE or (name in _NORMS and id(layer) in inside):
            FastLayerNorm.replace(layer)
            layer.in_block = id(layer) in inside  # type: ignore[assignment]
        else:
            continue
        count += 1
    return count


def _name(layer: nn.Module) -> str:
    """Return the dotted name of a layer's class."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}"
