"""QuickGELU by PyTorch's kernels and by Triton's, in the interpreter, against open_clip's module."""

from typing import Any

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from randlora_pl.models import execution
from randlora_pl.models.execution import quick_gelu, quick_gelu_backward
from randlora_pl.utils import device
from tests.support.products import in_one_item

from .test_fast_layers import BF16, Kernels, error, random, values


def test_quick_gelu_is_exact_in_float64_and_rounds_once_in_less() -> None:
    x, gradient = 6 * random(4096).double(), random(4096, seed=1).double()
    x[:6] = torch.tensor([0.0, 40.0, -40.0, 500.0, -500.0, 47.0])
    module = QuickGELU()
    exact = values(module, x, gradient)
    for found, wanted in zip(values(quick_gelu, x, gradient), exact, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(quick_gelu, x[6:12].requires_grad_())
    for dtype in (torch.float32, torch.float16, BF16):
        low, slope = x.detach().to(dtype), gradient.to(dtype)
        exact = values(module, low.double(), slope.double())
        fast, plain = values(quick_gelu, low, slope), values(module, low, slope)
        assert {value.dtype for value in fast} == {dtype}
        for found, other, wanted in zip(fast, plain, exact, strict=True):
            assert found.isfinite().all()
            assert error(found, wanted) <= max(error(other, wanted), 3 * torch.finfo(torch.float32).eps)


def test_quick_gelu_is_a_kernel_and_its_gradient_two_and_it_keeps_its_input_alone() -> None:
    x, kept = random(64).requires_grad_(), list[Tensor]()
    with Kernels() as forward, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = quick_gelu(x)
    with Kernels() as backward:
        result.backward(torch.ones(64))
    assert forward.counts == {"softplus_backward": 1}
    assert {"mul": 1, "silu_backward": 1}.items() <= backward.counts.items()
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]


def gradients(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return quick_gelu_backward(gradient, x), values(QuickGELU(), x.double(), gradient.double())[1]


@in_one_item(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (BF16, 6e-3)]
)  # the interpreter cuts bfloat16 off instead of rounding it
def test_the_kernel_computes_the_gradient(dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("triton")
    x, gradient = (6 * random(3, 1025)).to(dtype), random(3, 1025, seed=1).to(dtype)
    found, exact = gradients(x, gradient)
    assert found.dtype == dtype and found.shape == x.shape
    assert error(found, exact) < tolerance
    x, gradient = x[:, ::2], gradient.T.contiguous().T[:, ::2]
    found, exact = gradients(x, gradient)
    assert error(found, exact) < tolerance


def test_the_kernel_is_an_operator_of_pytorch() -> None:
    pytest.importorskip("triton")
    torch.library.opcheck(quick_gelu_backward, (random(4, 6).T, random(6, 4)))


def test_the_kernel_runs_for_large_tensors_on_a_gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels_of(size: int, variable: str = "1", triton: bool = True) -> set[str]:
        monkeypatch.setattr(device, "VALUE", variable)
        monkeypatch.setattr(device, "_able", lambda _: triton)
        monkeypatch.setattr(execution, "_LEAST", 64)
        with FakeTensorMode():
            x: Any = torch.empty(size, requires_grad=True)
            with pytest.MonkeyPatch.context() as patch, Kernels() as kernels:
                patch.setattr(type(x), "is_cuda", True, raising=False)
                quick_gelu(x).backward(torch.empty(size))
        return set(kernels.counts) - {"detach", "device", "empty", "empty_like"}

    plain = {"softplus_backward", "mul", "silu_backward"}
    assert kernels_of(64) == {"softplus_backward", "quick_gelu_backward"}
    assert kernels_of(63) == kernels_of(64, "0") == kernels_of(64, triton=False) == plain
