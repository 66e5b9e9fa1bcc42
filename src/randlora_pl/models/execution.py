"""Execution of a backbone: dtype of its frozen matrices, compiled blocks, and layers fused into one GPU kernel.

On a CPU such layers run as the library wrote them. QuickGELU, x sigmoid(1.702 x), takes few kernels by `quick_gelu`,
and ``randlora::quick_gelu_backward`` in Triton.
"""

import os
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from randlora_pl.utils import device
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.packed import unpacks_itself


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of all towers by path, in model order; nested blocks are not included.

    Blocks are the members of a list or sequence of at least two modules of one class that have child modules:
    ``visual.transformer.resblocks.0`` of open_clip, ``blocks.0`` of timm, ``encoder.layer.0`` of transformers.
    """
    blocks: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        members = dict(module.named_children()) if isinstance(module, nn.ModuleList | nn.Sequential) else {}
        whole = all(  # a linear layer with an adapter has a child module
            next(member.children(), None) is not None and not isinstance(member, nn.Linear)
            for member in members.values()
        )
        if len(members) > 1 and whole and len({type(member) for member in members.values()}) == 1:
            blocks |= {f"{path}.{name}".lstrip("."): member for name, member in members.items()}
    # A stage of a hierarchical model looks like a block, but contains blocks itself.
    stages = {path for path in blocks if any(other.startswith(f"{path}.") for other in blocks)}
    return {path: block for path, block in blocks.items() if path not in stages}


MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
"""Modes of ``torch.compile``, all of inductor."""
GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes that replay CUDA graphs, whose results live until the next step."""


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> int:
    """Cast the frozen matrices of linear, attention and convolution layers in place, and their frozen biases.

    Autocast would cast them for every product, again in each step. Embeddings, norms and trainable parameters keep
    their dtype.

    Examples:
        >>> clip = load_clip("tiny")
        >>> report = inject(clip.model, RandLoRA(rank=6))
        >>> cast_frozen(clip.model, torch.bfloat16)
        41

    Returns:
        Number of these matrices, with quantized ones, which are not cast.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.Conv2d):
            own = [parameter for parameter in module.parameters(recurse=False) if not parameter.requires_grad]
            plain = all(p.is_floating_point() and not unpacks_itself(p) for p in own)  # else quantized
            for parameter in own:
                if plain:
                    parameter.data = parameter.data.to(dtype)
                count += parameter.dim() > 1
    return count


def compile_blocks(model: nn.Module, how: str, device: torch.device) -> None:
    """Compile each repeated block with ``torch.compile``, in place; names, references and hooks stay.

    Blocks of one class share the compiled code, so compile time does not grow with depth. A compiled block keeps
    for its backward pass the tensors that ``memory: low`` of RandLoRA would rebuild. Dynamo's recompile limit is raised
    for the whole process.

    Examples:
        >>> compile_blocks(load_clip("tiny").model, "max-autotune", torch.device("cpu"))  # at the first use

    Args:
        model: A backbone.
        how: One of `MODES`, or a backend.
        device: Device of the first use.

    Raises:
        UserError: The mode or backend is unknown, the model has no repeated blocks, or a required C++ compiler is
            missing.
    """
    backend = "inductor" if how in MODES else how
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = [*MODES, *torch.compiler.list_backends()]
        raise UserError(
            f"--model.torch_compile {how} is unknown. Set true, false, a mode or a backend.{near(how, known)} "
            f"Known: {', '.join(known)}"
        )
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if backend == "inductor" and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--model.torch_compile needs a C++ compiler on a CPU. Install g++, or remove the option.")
    blocks = repeated_blocks(model)
    if not blocks:
        raise UserError(f"--model.torch_compile finds no repeated blocks in {type(model).__name__}. Remove the option.")
    import torch._dynamo.config as dynamo  # takes a second to import

    # Two tower widths, training and evaluation, and a smaller last batch exceed the default limit of 8 variants.
    dynamo.recompile_limit = max(64, dynamo.recompile_limit)
    for block in blocks.values():
        block.compile(backend=backend, mode=how if how in MODES else None)


aten: Any = torch.ops.aten
SCALE = 1.702
_LEAST = 1 << 24
"""Entries from which the memory traffic that Triton's kernel saves takes longer than its launch."""


@torch.library.custom_op("randlora::quick_gelu_backward", mutates_args=())
def quick_gelu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Return ``gradient s (1 + z (1 - s))`` for z = 1.702 x and s = sigmoid(z), computed in float32.

    Args:
        gradient: Gradient of the result, of the shape of x.
        x: Input of the activation.
    """
    from randlora_pl.models.activation_jit import BLOCK, backward_kernel

    x, gradient = x.contiguous(), gradient.contiguous()
    out = torch.empty_like(x)
    backward_kernel[(-(-x.numel() // BLOCK),)](out, gradient, x, x.numel(), SCALE=SCALE, num_warps=4)
    return out


@quick_gelu_backward.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class _QuickGELU(torch.autograd.Function):
    """QuickGELU by kernels that PyTorch has for other functions; keeps only its input.

    The gradient of softplus is g sigmoid(beta x), which is QuickGELU for g = x. The gradient of SiLU,
    g s(z) (1 + z (1 - s(z))), is QuickGELU's for z = 1.702 x. Both compute in float32 and round once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # Threshold 80, where sigmoid is 1 in float32, and exp is finite.
        result: Tensor = aten.softplus_backward(x, x, SCALE, 80.0)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # neither kernel can be derived once more
            scaled = x * SCALE
            share = scaled.sigmoid()
            slope: Tensor = share * (1 + scaled * (1 - share))
            return gradient * slope
        kernel = x.numel() >= _LEAST and device.runs(x, x.dtype)
        result: Tensor = quick_gelu_backward(gradient, x) if kernel else aten.silu_backward(gradient, x * SCALE)
        return result


def quick_gelu(x: Tensor) -> Tensor:
    """Compute QuickGELU in one kernel, and its gradient in one or two.

    Written out, it is three kernels and six for the gradient, and keeps three tensors for the backward pass.

    Args:
        x: Any shape and floating dtype.

    Returns:
        A tensor of the same shape and dtype.
    """
    result: Tensor = _QuickGELU.apply(x)  # type: ignore[no-untyped-call, unused-ignore]
    return result


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
        if device.on_cuda(x) and not torch.compiler.is_compiling():
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
        if device.on_cuda(x) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            if self.in_block or x.dtype == dtype:
                weight, bias = self._parameters_as(dtype)
                with torch.autocast(kind, enabled=False):
                    return nn.functional.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)
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
        fused = device.on_cuda(hidden_states) and not torch.compiler.is_compiling() and hasattr(aten, "_fused_rms_norm")
        if fused and hidden_states.dtype == self.weight.dtype:
            with torch.autocast(hidden_states.device.type, enabled=False):
                return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        result: Tensor = self.plain.forward(self, hidden_states)
        return result


def use_fast_layers(model: nn.Module) -> int:
    """Make LayerNorm, RMSNorm and QuickGELU of a backbone run as single kernels on a GPU, in place.

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
    return f"{type(layer).__module__}.{type(layer).__qualname__}"
