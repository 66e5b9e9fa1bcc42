"""A GPU that is not there: tensors without data that say they are on CUDA, and CUDA's rules for them.

On a build of PyTorch without CUDA, autograd cannot run on tensors whose device is CUDA in C++. So C++ sees them
on the CPU while Python sees CUDA, and what C++ would decide by the device is decided here: autocast's casts, which
attention runs, and dropout in one kernel. The same happens on a machine with a GPU, so that counts are equal anywhere.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.cuda.amp.common
import torch.utils._foreach_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

DEVICE = torch.device("cuda", 0)
_KEY = torch._C.DispatchKey.AutocastCUDA
_LOWER = "linear matmul mm bmm mv addmm addmv addr baddbmm addbmm conv1d conv2d conv3d convolution prelu"
_FULL = (
    "layer_norm native_layer_norm group_norm exp expm1 log log2 log10 log1p reciprocal rsqrt pow.Tensor_Scalar "
    "pow.Tensor_Tensor softplus norm.Scalar norm.ScalarOpt_dim nll_loss cross_entropy_loss mse_loss l1_loss "
    "smooth_l1_loss kl_div soft_margin_loss cosine_similarity renorm dist binary_cross_entropy_with_logits"
)
_RESULT = "softmax.int log_softmax.int cumsum cumprod prod sum sum.dim_IntList"
"""Functions that CUDA's autocast runs in the low precision, with inputs cast to float32, and with results in float32
(aten/src/ATen/autocast_mode.h)."""

_COMPOSED = "silu_backward mish_backward"
"""Functions with a kernel of their own in builds with CUDA, which others compose of several."""


class _Autocast:
    """CUDA's autocast rules, for tensors that C++ takes for the CPU's; casts of trained leaves are kept."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        """Return a floating-point tensor in a dtype, and anything else as it is."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.cast(one, dtype) for one in value)
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        leaf = value.is_leaf and value.requires_grad and value.dtype == torch.float32 and dtype != torch.float32
        if not leaf or not torch.is_autocast_cache_enabled():
            return value.to(dtype)
        if id(value) not in self.kept:
            self.kept[id(value)] = (value, value.to(dtype))
        return self.kept[id(value)][1]

    def rule(self, operator: Any, lower: bool) -> Callable[..., Any]:
        """Return an operator with its arguments cast first."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
                dtype = torch.get_autocast_dtype("cuda") if lower else torch.float32
                cast = [self.cast(one, dtype) for one in args]
                return operator(*cast, **{name: self.cast(one, dtype) for name, one in kwargs.items()})

        return run

    def wider(self, operator: Any) -> Callable[..., Any]:
        """Return an operator with a result in float32 where nothing else is asked for."""

        def run(value: Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
                names = (argument.name for argument in operator._schema.arguments[1:])
                options = dict(zip(names, args, strict=False)) | kwargs
                if value.dtype in (torch.bfloat16, torch.float16) and options.get("dtype") is None:
                    options["dtype"] = torch.float32
                return operator(value, **options)

        return run

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Run the kernel that CUDA takes: flash attention in half precision without a mask, else the efficient one."""
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value, attn_mask = (self.cast(one, dtype) for one in (query, key, value, attn_mask))
            aten = torch.ops.aten
            if attn_mask is None and query.dtype != torch.float32:  # with shared heads as they are
                flash = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
                return flash[0]  # type: ignore[no-any-return]
            if enable_gqa:
                times = query.shape[-3] // key.shape[-3]
                key, value = (one.repeat_interleave(times, -3) for one in (key, value))
            if attn_mask is not None:
                if attn_mask.dtype == torch.bool:
                    attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
                attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
            efficient = aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
            )
            return efficient[0]  # type: ignore[no-any-return]

    def dropout(self, value: Tensor, p: float, train: bool) -> Tensor:
        """Drop entries and keep the mask, in one kernel."""
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
            return torch.native_dropout(value, p, train)[0] if train and p else value


def _below_autograd(operator: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **kwargs)

    return run


class _RMSNorm(torch.autograd.Function):
    """RMSNorm by the kernels of builds with CUDA, in place of PyTorch's own rule for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Any:
        result, rstd = _below_autograd(torch.ops.aten._fused_rms_norm)(x, shape, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.shape = shape
        return result, rstd

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x, rstd, weight), needed = ctx.saved_tensors, [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        of = torch.ops.aten._fused_rms_norm_backward(gradients[0], x, ctx.shape, rstd, weight, needed)
        return of[0], None, of[1], None


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


@contextmanager
def cuda_rules() -> Iterator[None]:
    """Let autocast, attention, dropout and groups of tensors on `DEVICE` behave as on a GPU inside the block."""
    rules = _Autocast()
    make: Any = torch.library.Library
    library = make("aten", "IMPL")
    clear = torch.clear_autocast_cache

    def cleared() -> None:
        rules.kept.clear()
        clear()

    with ExitStack() as stack:
        stack.callback(library._destroy)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # that kernels are overridden
        library.impl("_fused_sgd_", lambda *_, **__: None, "Meta", allow_override=True)  # PyTorch has AdamW's alone
        for names, lower in ((_LOWER, True), (_FULL, False)):
            for name in names.split():
                rule = rules.rule(_operator(name), lower)
                library.impl(name, rule, "AutocastCUDA", allow_override=True)
        for name in _RESULT.split():
            library.impl(name, rules.wider(_operator(name)), "AutocastCUDA", allow_override=True)
        for name in _COMPOSED.split():
            library.impl(name, _below_autograd(_operator(name)), "AutogradCUDA", allow_override=True)
        library.impl("_fused_rms_norm", _RMSNorm.apply, "AutogradCUDA", allow_override=True)
        for name, own in (("scaled_dot_product_attention", rules.attention), ("dropout", rules.dropout)):
            library.impl(name, own, "AutocastCUDA", allow_override=True)
        stack.enter_context(patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(patch("randlora_pl.utils.device._able", lambda _: True))
        stack.enter_context(patch.dict("os.environ", {"TRITON_INTERPRET": "0"}))
        on_device = property(lambda tensor: tensor.fake_device.type == "cuda")
        stack.enter_context(patch.object(FakeTensor, "is_cuda", on_device))
        stack.enter_context(patch("torch.cuda.is_bf16_supported", lambda *_: True))
        stack.enter_context(patch("torch.clear_autocast_cache", cleared))
        for module in (torch.utils._foreach_utils, __import__("sys").modules["torch.optim.optimizer"]):
            kinds = module._foreach_supported_types
            stack.enter_context(patch.object(module, "_foreach_supported_types", [*kinds, FakeTensor]))
        yield


def fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a tensor on `DEVICE` of the shape and dtype of another, without data."""
    with torch.no_grad():
        return FakeTensor(mode, tensor.detach().to("meta"), DEVICE)


def to_fake(mode: FakeTensorMode, module: nn.Module) -> None:
    """Move a module, built on the meta device, to `DEVICE`; parameters that are shared stay shared."""
    moved: dict[int, Tensor] = {}

    def of(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            new = fake(mode, tensor)
            parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
        return moved[id(tensor)]

    for child in module.modules():
        held: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for tensors in held:
            tensors.update({name: of(tensor) for name, tensor in tensors.items() if tensor is not None})
