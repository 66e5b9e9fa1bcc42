"""Products in float16: small values of S survive, results and gradients are those of float32."""

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import RandLoRA
from randlora_pl.adapters.kernels.basis_product import mixed_stack
from randlora_pl.adapters.methods.randlora import RandLoRADelta
from randlora_pl.adapters.random_bases import WeightShape
from tests.support.products import in_one_item

OUT, IN = 896, 896  # the query of Qwen2-0.5B, which `recipes/commonsense_official` trains with these rates
RATE, WARMUP = 1e-4, 100


def first_step(**options: object) -> tuple[RandLoRADelta, Tensor]:
    """A layer after one step of Adam, which is as long as its learning rate whatever the gradient is."""
    torch.manual_seed(0)
    shape = WeightShape("q", OUT, IN)
    adapter = RandLoRA(rank=10, alpha=20, init="lambda", **options)  # type: ignore[arg-type]
    weight = 0.02 * torch.randn(OUT, IN)
    delta = adapter.delta_weight(shape, weight, adapter.bases([shape], torch.device("cpu")))
    with torch.no_grad():
        delta.lambdas.add_(torch.randn(delta.lambdas.shape).sign(), alpha=RATE / WARMUP)
    return delta, weight


def stacks(delta: RandLoRADelta) -> tuple[Tensor, Tensor]:
    """S in float32 and in float16 products, both as real numbers."""
    exact, half = (
        mixed_stack(delta.basis(), delta.tensors(), delta.form(), dtype) for dtype in (torch.float32, torch.float16)
    )
    return exact.double(), half.double() / 2**12


@in_one_item("basis", ["uniform", "hadamard"])
@torch.no_grad()
def test_less_than_one_percent_of_s_vanishes_after_the_first_step(basis: str) -> None:
    delta, weight = first_step(basis=basis)
    exact, half = stacks(delta)
    assert float(((half == 0) & (exact != 0)).double().mean()) < 0.01
    assert float((half - exact).norm() / exact.norm()) < 0.1
    assert float((exact.half() == 0).double().mean()) > 0.99  # as it would be without the factor
    with torch.autocast("cpu", torch.float16):
        found = delta.effective_weight(weight) - weight
    change = delta.change(torch.empty(0))
    assert float((found * change).sum() / change.square().sum()) == pytest.approx(1, abs=0.02)


@in_one_item(
    ("basis", "tokens", "shape"),
    [
        (basis, tokens, shape)
        for basis in ("uniform", "hadamard")
        for tokens in (8, 400)
        for shape in ((96, 160), (160, 96))
    ],
)
def test_outputs_and_scaled_gradients_are_those_of_float32(basis: str, tokens: int, shape: tuple[int, int]) -> None:
    """Thin products and built weights, with the loss scale that GradScaler starts with, for small and for large S."""
    torch.manual_seed(0)
    where = WeightShape("fc", *shape)
    adapter = RandLoRA(rank=4, basis=basis, init="lambda")
    weight = 0.02 * torch.randn(shape)
    delta = adapter.delta_weight(where, weight, adapter.bases([where], torch.device("cpu")))
    scale = 2.0**16
    for size in (1e-6, 1e-3, 0.02):
        with torch.no_grad():
            delta.lambdas.copy_(size * torch.randn(delta.lambdas.shape))
        x, upstream = torch.randn(tokens, shape[1]).half(), torch.randn(tokens, shape[0]) / tokens / 100
        found = []
        for half in (False, True):
            inputs = (x if half else x.float()).clone().requires_grad_()
            with torch.autocast("cpu", torch.float16, enabled=half):
                for own in (weight, None):  # with W0, and the update's part alone
                    out = delta.contribution(inputs, lambda: weight) if own is None else delta.add(inputs, own, None)
                    loss = (out.float() * upstream).sum() * scale
                    gradients = torch.autograd.grad(loss, (inputs, delta.lambdas, delta.gammas))
                    found.append([out.detach().float(), *(each.float() / scale for each in gradients)])
        for own, pair in enumerate(zip(found[:2], found[2:], strict=True)):
            for place, (one, other) in enumerate(zip(*pair, strict=True)):
                alone = own == 1 and place < 2 and size == 1e-6  # B S itself is subnormal
                assert (one - other).norm() <= (0.1 if alone else 0.002) * one.norm(), (size, own, place)


def test_the_range() -> None:
    delta, _ = first_step()
    with torch.no_grad():
        delta.lambdas.fill_(1.0)
        exact, _ = stacks(delta)
        delta.lambdas.mul_(15.9 / exact.abs().max())
        exact, half = stacks(delta)
    assert half.isfinite().all() and (half - exact).norm() <= 1e-3 * exact.norm()
