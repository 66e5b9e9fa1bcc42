"""QuickGELU and LayerNorm as they run on a GPU: numbers against the libraries' modules, and kernels counted."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from open_clip.transformer import LayerNorm, LayerNormFp32, QuickGELU
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from randlora_pl.adapters import FullFineTuning, RandLoRA, inject
from randlora_pl.models import ImageTower, cast_frozen, execution, load_clip, load_vit, use_fast_layers
from randlora_pl.models.execution import FastLayerNorm, quick_gelu, quick_gelu_backward
from randlora_pl.utils import device
from randlora_pl.utils.device import choose_as_on_cuda
from tests.support.products import in_one_item

BF16 = torch.bfloat16


class Kernels(TorchDispatchMode):
    """Count the operations by name, and casts by their dtypes; with ``batches`` those of tokens (batch, n, width)."""

    def __init__(self, *batches: int) -> None:
        super().__init__()
        self.batches, self.counts = batches, Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self.batches or any(isinstance(x, Tensor) and x.dim() == 3 and len(x) in self.batches for x in args):
            name = function.overloadpacket.__name__
            if name == "_to_copy":
                name = f"{args[0].dtype} to {result.dtype}".replace("torch.", "")
            self.counts[name] += 1
        return result

    @property
    def casts(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if " to " in name}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(function: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    result = function(x)
    result.backward(gradient)
    assert x.grad is not None
    return result.detach(), x.grad


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def small(quick: bool = True) -> tuple[nn.Module, Tensor]:
    """Return the tiny CLIP's image tower, with QuickGELU and norms that are not 1 and 0."""
    clip = copy.deepcopy(load_clip("tiny").model)
    for block in [*clip.transformer.resblocks, *clip.visual.transformer.resblocks] if quick else ():  # type: ignore[union-attr]
        block.mlp.gelu = QuickGELU()
    return clip, random(5, 3, 32, 32)


def vit() -> tuple[nn.Module, Tensor]:
    loaded = load_vit("test_vit", "random")
    return copy.deepcopy(loaded.model), random(5, 3, loaded.image.size, loaded.image.size)


def encode(model: nn.Module, images: Tensor) -> Tensor:
    if hasattr(model, "encode_text"):
        tokens = torch.arange(16).remainder(7).repeat(7, 1)
        return torch.cat([ImageTower(model)(images), model.encode_text(tokens)])  # type: ignore[operator]
    output: Tensor = model(images)
    return output


def test_a_cpu_computes_what_the_libraries_do_bit_for_bit() -> None:
    for model, images in (small(), vit()):
        plain = encode(model, images)
        with torch.autocast("cpu", BF16):
            rounded = encode(model, images)
        names = list(model.state_dict())
        assert use_fast_layers(model) >= 5
        assert list(model.state_dict()) == names
        assert torch.equal(encode(model, images), plain)
        with torch.autocast("cpu", BF16):
            assert torch.equal(encode(model, images), rounded)
        assert use_fast_layers(model) == 0  # once


def test_layer_norm_of_bfloat16_rounds_little_and_casts_nothing() -> None:
    """The reference is what CUDA's autocast does: float32, and a cast of the output."""
    x, slope = (random(32, 192) * 5 + random(192, seed=1)).to(BF16), random(32, 192, seed=4).to(BF16)
    for plain in (nn.LayerNorm(192), LayerNorm(192), LayerNormFp32(192)):
        with torch.no_grad():
            plain.weight.copy_(1 + random(192, seed=2) / 5)
            plain.bias.copy_(random(192, seed=3) / 5)
        plain.requires_grad_(False)
        layer: Any = copy.deepcopy(plain)
        FastLayerNorm.replace(layer)
        layer.in_block = True
        exact = values(plain, x.float(), slope.float())
        with choose_as_on_cuda(), torch.autocast("cpu", BF16):
            with torch.inference_mode():
                layer(x)  # a validation makes the copies
            found = values(layer, x, slope)
            for value, wanted in zip(found, exact, strict=True):
                assert value.dtype == BF16 and error(value, wanted) < 0.005
            with Kernels() as kernels:
                values(layer, x, slope)
            assert not kernels.casts
            assert layer(x.float()).dtype == BF16  # as the next product would cast it
            layer.in_block = False
            assert layer(x).dtype == BF16
            assert layer(x.float()).dtype == torch.float32
            with torch.no_grad():
                layer.weight.zero_()  # the copies follow
                layer.bias.fill_(2)
            assert torch.equal(layer(x), torch.full_like(x, 2))


def test_rms_norm_rounds_once_on_a_gpu_and_as_the_library_on_a_cpu() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, slope = (random(32, 192) * 5).to(BF16), random(32, 192, seed=4).to(BF16)
    plain = LlamaRMSNorm(192, eps=1e-3).to(BF16)
    with torch.no_grad():
        plain.weight.copy_(1 + random(192, seed=2) / 5)
    plain.requires_grad_(False)
    layer: Any = copy.deepcopy(plain)
    assert use_fast_layers(nn.Sequential(layer, GemmaRMSNorm(192))) == 1  # Gemma's weight is an offset from 1
    exact = values(lambda x: x / (x.square().mean(-1, True) + 1e-3).sqrt() * plain.weight, x.double(), slope.double())
    for value, wanted in zip(values(layer, x, slope), values(plain, x, slope), strict=True):
        assert torch.equal(value, wanted)
    with choose_as_on_cuda(), torch.autocast("cpu", BF16):
        found = values(layer, x, slope)
        for value, wanted, rounded in zip(found, exact, values(plain, x, slope), strict=True):
            assert value.dtype == BF16 and error(value, wanted) <= error(rounded, wanted) < 0.005
        assert torch.equal(layer(x.float()), plain(x.float()))  # two dtypes have no kernel
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2, vocab_size=8
    )
    assert use_fast_layers(transformers.LlamaForCausalLM(config)) == 2 * 2 + 1


@pytest.fixture
def cuda_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a CPU the rule of CUDA's autocast that LayerNorm is computed in float32."""
    original = torch.nn.functional.layer_norm

    def layer_norm(x: Tensor, *options: Any) -> Tensor:
        return original(x.float() if torch.is_autocast_enabled("cpu") else x, *options)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", layer_norm)


@in_one_item(
    ("make", "norms", "quick", "casts", "fewer"),
    [
        (small, 2 * 10 + 2, 10, 2, 136),  # casts of the text's embeddings and their gradient
        (vit, 2 * 6, 0, 3 * 12, 0),  # timm adds outputs of blocks in float32: before a norm, and two for its gradient
    ],
)
def test_a_step_casts_no_tokens_around_norms_and_activations(
    make: Callable[[], tuple[nn.Module, Tensor]], norms: int, quick: int, casts: int, fewer: int, cuda_autocast: None
) -> None:
    model, images = make()
    inject(model, RandLoRA(rank=4))
    cast_frozen(model, BF16)

    def step() -> Kernels:
        with Kernels(5, 7) as kernels, torch.autocast("cpu", BF16):
            encode(model, images).float().square().sum().backward()
        return kernels

    plain = step()
    assert use_fast_layers(model) > 5
    with choose_as_on_cuda():
        fast = step()
    assert fast.counts["softplus_backward"] == fast.counts["silu_backward"] == quick
    assert fast.counts["native_layer_norm"] == plain.counts["native_layer_norm"] == norms + 1
    assert sum(fast.casts.values()) <= casts
    free = ("view", "detach")
    kernels = [sum(n for name, n in run.counts.items() if name not in free) for run in (plain, fast)]
    assert kernels[0] - kernels[1] >= fewer


def test_text_towers_attend_causally_without_a_mask_on_a_gpu() -> None:
    model, _ = small(quick=False)
    inject(model, RandLoRA(rank=4))
    mask: Any = model.attn_mask
    assert torch.equal(mask, torch.full((16, 16), -torch.inf).triu(1))
    tokens = torch.arange(16).remainder(7).repeat(3, 1)

    def step() -> tuple[list[Any], Tensor, dict[str, Tensor]]:
        calls: list[Any] = []
        original = torch.nn.functional.scaled_dot_product_attention
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                torch.nn.functional, "scaled_dot_product_attention",
                lambda *args, **options: calls.append(options) or original(*args, **options),
            )  # fmt: skip
            features: Tensor = model.encode_text(tokens)  # type: ignore[operator]
        model.zero_grad()
        features.square().sum().backward()
        trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return calls, features.detach(), trained

    plain = step()
    use_fast_layers(model)
    assert torch.equal(step()[1], plain[1])  # on a CPU the mask stays
    with choose_as_on_cuda():
        fast = step()
        image_tower = [layer for layer in model.visual.modules() if getattr(layer, "causal", False)]  # type: ignore[union-attr]
        several: Any = mask.repeat(3 * 4, 1, 1)
        attention: Any = model.transformer.resblocks[0].attn  # type: ignore[union-attr, index]
        x = random(3, 16, 128)
        masked = [attention(x, x, x, attn_mask=one, need_weights=False)[0] for one in (mask, several)]
    torch.testing.assert_close(*masked)
    assert not image_tower
    assert all(call["attn_mask"] is not None and not call["is_causal"] for call in plain[0])
    assert len(fast[0]) == 4 and all(call["attn_mask"] is None and call["is_causal"] for call in fast[0])
    torch.testing.assert_close(fast[1], plain[1], rtol=1e-5, atol=1e-5)
    for name, value in plain[2].items():
        torch.testing.assert_close(fast[2][name], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))


def test_compiled_blocks_are_one_graph() -> None:
    model, _ = small()
    inject(model, RandLoRA(rank=4))
    use_fast_layers(model)
    block: Any = model.transformer.resblocks[0]  # type: ignore[union-attr, index]
    x, found = random(3, 16, 128), []
    for call in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        with choose_as_on_cuda(), torch.autocast("cpu", BF16):
            result = call(x, attn_mask=model.attn_mask)
        result.square().sum().backward()
        found.append([result.detach()] + [p.grad.clone() for p in block.parameters() if p.grad is not None])
        block.zero_grad()
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 0.02 * other.norm()


def test_norms_that_train_have_the_gradients_of_float32_norms() -> None:
    gradients = []
    for context in (nullcontext, choose_as_on_cuda):
        model, images = small()
        inject(model, FullFineTuning())
        use_fast_layers(model)
        with context(), torch.autocast("cpu", BF16):
            encode(model, images).float().square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        assert wanted.dtype == gradients[1][name].dtype == torch.float32
        assert error(gradients[1][name], wanted.double()) < 0.05, name


# QuickGELU in Triton, in the interpreter, and by PyTorch's kernels


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
