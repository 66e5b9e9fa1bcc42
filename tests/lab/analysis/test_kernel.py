"""Tangent kernels against closed forms and token by token, and what has none."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    Adapter,
    BitFit,
    DoRA,
    FullFineTuning,
    GaLore,
    HydraLoRA,
    LinearProbe,
    LoRA,
    PiSSA,
    RandLoRA,
    inject,
)
from randlora_pl.lab.analysis.kernel import (
    Trained,
    align,
    alignment,
    layer_weights,
    passes,
    tangent_kernel,
    trained_tensors,
)
from randlora_pl.utils.errors import UserError

ROOM = 1 << 30


class Attending(nn.Module):
    """Attention with packed weights and two linear layers, (b, tokens, 8) to (b, tokens, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attn(x, x, x, need_weights=False)[0]
        output: Tensor = self.fc2(self.fc1(attended).tanh())
        return output


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attending() -> Attending:
    torch.manual_seed(0)
    return Attending().eval()


def losses_of(model: nn.Module, count: int = 4) -> list[Callable[[], Tensor]]:
    return [lambda x=x: model(x).square().sum() for x in normal(1, count, 1, 5, 8)]


def linear(adapter: Adapter) -> nn.Sequential:
    """One layer with a method, 7 to 9."""
    model = nn.Sequential(nn.Linear(7, 9, bias=False))
    inject(model, adapter, targets=["0"])
    return model


def products(model: nn.Module, x: Tensor, g: Tensor) -> list[Callable[[], Tensor]]:
    """Losses <g, outputs>, whose gradient with regard to the outputs is g."""
    return [lambda i=i: model(x[i : i + 1])[0] @ g[i] for i in range(len(x))]


def call(loss: Callable[[], Tensor]) -> Tensor:
    return loss()


def kernel_of(losses: list[Callable[[], Tensor]], trained: list[Trained]) -> Tensor:
    return tangent_kernel(call, losses, [trained])


def test_closed_forms_of_one_linear_layer() -> None:
    """Full fine-tuning has <x, x'> <g, g'>; LoRA at B = 0 has <A x, A x'> <g, g'>, times its squared scaling."""
    model, x, g = linear(LoRA(rank=2, alpha=6, seed=3)), normal(0, 6, 7), normal(1, 6, 9)
    losses, trained = products(model, x, g), trained_tensors(model)
    own, full = kernel_of(losses, trained), kernel_of(losses, layer_weights(model))
    a = next(each.tensor.detach() for each in trained if each.tensor.shape == (2, 7))
    exact, sketched = (x @ x.T) * (g @ g.T), (x @ a.T) @ (a @ x.T) * (g @ g.T)
    torch.testing.assert_close(full.float(), exact)
    torch.testing.assert_close(own.float(), 9 * sketched)
    faster = [Trained(each.tensor, 2.0) for each in trained]
    torch.testing.assert_close(kernel_of(losses, faster), 2 * own)
    aligned = float((exact * sketched).sum() / (exact.norm() * sketched.norm()))
    assert alignment(own, full) == pytest.approx(aligned, rel=1e-5) and 0 < aligned < 0.99


@pytest.mark.parametrize(("adapter", "exact"), [(RandLoRA(rank=2), True), (LoRA(rank=2), False)])
def test_randlora_keeps_inputs_apart_and_lora_mixes_them(adapter: Adapter, exact: bool) -> None:
    model = linear(adapter.replace(seed=1))
    kernel = kernel_of(products(model, torch.eye(7), normal(1, 7, 9)), trained_tensors(model))
    assert bool((kernel - kernel.diag().diag()).abs().max() < 1e-6 * kernel.max()) == exact


def test_full_fine_tuning_token_by_token() -> None:
    """The sum over pairs of tokens, and of a packed weight the adapted blocks alone, in any number of passes."""
    model = attending()
    plain, seen = copy.deepcopy(model), list[tuple[Tensor, Tensor]]()
    for layer in (plain.fc1, plain.fc2):
        layer.register_forward_hook(
            lambda _, inputs, output: (output.retain_grad(), seen.append((inputs[0], output)))[1]
        )
    packed = []
    for loss in losses_of(plain):
        plain.zero_grad()
        loss().backward()
        assert plain.attn.in_proj_weight.grad is not None
        packed.append(plain.attn.in_proj_weight.grad[[*range(8), *range(16, 24)]].flatten())
    slow = torch.stack(packed) @ torch.stack(packed).T
    pairs = [(x[0], output.grad[0]) for x, output in seen if output.grad is not None]
    for i in range(4):
        for j in range(4):
            for layer in range(2):
                (x, g), (y, h) = pairs[2 * i + layer], pairs[2 * j + layer]
                slow[i, j] += sum(x[s] @ y[t] * (g[s] @ h[t]) for s in range(5) for t in range(5))
    inject(model, LoRA(rank=1, qkv="split"), targets=["q", "v", "fc1", "fc2"])
    weights = layer_weights(model)
    assert len(passes(weights, 4, ROOM)) == 1 and len(passes(weights, 4, 4 * 4 * 192)) == 2
    for room in (ROOM, 4 * 4 * 192):
        kernel = tangent_kernel(call, losses_of(model), passes(weights, 4, room))
        torch.testing.assert_close(kernel.float(), slow.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [LoRA(rank=1), RandLoRA(rank=2), DoRA(LoRA(rank=1)), PiSSA(rank=2), HydraLoRA(rank=1)],
    ids=lambda adapter: adapter.method(),
)
def test_a_method_and_full_fine_tuning_start_at_the_same_losses(adapter: Adapter) -> None:
    """So that nothing but the gradients differs, also where a method changes the weights at its start."""
    model = attending()
    before = torch.stack([loss() for loss in losses_of(model)]).detach()
    inject(model, adapter.replace(seed=0) if not adapter.nested() else adapter, targets=["fc1", "fc2"])
    _, values = align(model, call, losses_of(model, 8), 4, 2, ROOM)
    torch.testing.assert_close(torch.stack([loss() for loss in losses_of(model)]), before, rtol=1e-4, atol=1e-4)
    assert len(values) == 2 and all(0.1 < value < 0.9999 for value in values)


def test_full_fine_tuning_is_aligned_with_itself_and_others_have_no_kernel() -> None:
    model = attending()
    inject(model, FullFineTuning())
    assert align(model, call, losses_of(model), 4, 1, ROOM) == (
        sum(each.numel() for each in model.parameters()),
        [pytest.approx(1.0)],
    )
    for adapter, message in (
        (GaLore(rank=2), "an optimizer of its own"),
        (BitFit(), "trains no weight"),
        (LinearProbe(), "trains no weight"),
    ):
        model = attending()
        inject(model, adapter)
        with pytest.raises(UserError, match=message):
            align(model, call, losses_of(model), 4, 1, ROOM)


def test_samples_that_do_not_fit_are_refused_by_count_before_any_is_read() -> None:
    """Their gradients, and the kernels of three batches, of full fine-tuning and of a product."""
    model = attending()
    inject(model, LoRA(rank=1), targets=["fc1"])
    unread = (pytest.fail() for _ in range(5))
    most = "give at most --samples"
    needed = 4 * 96 * 3 + 8 * 5 * 3**2
    for room, mend in (
        (needed - 1, f"{most} 2"),
        (needed, f"{most} 3"),
        (1000, f"{most} 2"),  # of LoRA's own tensors 4 would fit
        (800, "free some memory, or give fewer --batches"),
    ):
        with pytest.raises(UserError, match=rf"5 samples need 2.9 kB .* a tensor of 96 numbers.*: {mend}\.$"):
            align(model, call, unread, 5, 3, room)


def test_zero_gradients_have_no_alignment() -> None:
    model = attending()
    inject(model, LoRA(rank=1), targets=["fc1"])
    with pytest.raises(UserError, match="zero or not finite"):
        align(model, call, [lambda: torch.zeros(())] * 2, 2, 1, ROOM)
