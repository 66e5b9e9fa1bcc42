"""The search of AutoLoRA: its gradients against exact ones, what it finds, and what it leaves alone."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    AutoLoRA,
    LoRA,
    RandLoRA,
    adapted_layers,
    delta_weights,
    inject,
    trainable_parameters,
)
from randlora_pl.adapters.methods.autolora import Problem, _outer_gradient, components
from randlora_pl.adapters.operations import merge_and_unload
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, assert_close


def test_equal_shares_are_a_lora_divided_by_k_and_the_lora_found_has_k_times_the_scaling() -> None:
    model, plain, found = (One(12, 20) for _ in range(3))
    search = inject(model, AutoLoRA(rank=4, alpha=8, seed=3), ["fc"]).procedure
    inject(plain, LoRA(rank=4, alpha=8 / 4, seed=3), ["fc"])
    inject(found, LoRA(**search.finish()["search/adapter"]["init_args"], seed=3), ["fc"])
    b = torch.randn(20, 4)
    for each in (model, plain, found):
        trainable_parameters(each)["fc.delta.B"].data.copy_(b)
    update = delta_weights(model)["fc"]
    assert_close(update, delta_weights(plain)["fc"], 1e-6)
    assert_close(delta_weights(found)["fc"], 4 * update, 1e-6)
    assert "has K times the scaling of its search" in Path("docs/methods/autolora.md").read_text()


def toy() -> tuple[list[Tensor], Tensor, Callable[[str, list[Tensor], Tensor], Tensor]]:
    """Two layers with selection variables between them, and the losses on two sets of samples, in float64."""
    torch.manual_seed(1)
    weights = [torch.randn(5, 4, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)]
    v = torch.randn(4, dtype=torch.float64)
    data = {part: (torch.randn(30, 5).double(), torch.randn(30, 3).double()) for part in ("train", "search")}

    def loss(part: str, w: list[Tensor], v: Tensor) -> Tensor:
        x, y = data[part]
        return (torch.tanh(x @ w[0]) * (4 * v.softmax(0)) @ w[1] - y).square().mean()

    return [weight.requires_grad_() for weight in weights], v, loss


def test_the_gradient_goes_through_a_step_of_the_weights() -> None:
    """Against the exact second derivative; released code, without the factor of the learning rate, is far off."""
    weights, v, loss = toy()
    rates = [0.2, 0.1]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.register_post_accumulate_grad_hook(lambda _: pytest.fail("a hook of .grad was called"))
    problem = Problem(
        lambda _: loss("train", weights, v), lambda _: loss("search", weights, v),
        lambda: list(zip(weights, rates, strict=True)),
    )  # fmt: skip
    (first,), (unrolled,) = (_outer_gradient(problem, 0, [v], order) for order in (False, True))
    assert all(torch.equal(weight, kept) for weight, kept in zip(weights, before, strict=True))
    assert all(weight.grad is None for weight in weights) and not v.requires_grad and v.grad is None

    leaf, copies = v.clone().requires_grad_(), [kept.clone().requires_grad_() for kept in before]
    (expected,) = torch.autograd.grad(loss("search", copies, leaf), leaf)
    assert_close(first, expected, 1e-12)
    steps = torch.autograd.grad(loss("train", copies, leaf), copies, create_graph=True)
    moved = [w - rate * step for w, rate, step in zip(copies, rates, steps, strict=True)]
    constant = [each.detach() for each in moved]
    (direct,) = torch.autograd.grad(loss("search", constant, leaf), leaf)
    (exact,) = torch.autograd.grad(loss("search", moved, leaf), leaf)
    assert_close(unrolled, exact, 1e-3)
    assert (direct - exact).abs().max() > 0.02 * exact.abs().max()
    released = direct + (exact - direct) / 0.1  # with equal rates
    assert (released - exact).abs().max() > 0.2 * exact.abs().max()


def test_without_a_direction_nothing_is_divided_by_zero() -> None:
    weights, v, loss = toy()
    losses = [lambda _, part=part: loss(part, weights, v) for part in ("train", "search")]
    still = Problem(*losses, lambda: [(weight, 0.0) for weight in weights])
    assert torch.equal(*(_outer_gradient(still, 0, [v], order)[0] for order in (False, True)))


def test_components_above_the_mean_are_kept_and_all_equal_ones() -> None:
    for size in (1, 2, 3, 7, 8, 10, 48, 3000):
        for value in (0.0, 0.1, -3.7):
            assert components(torch.full((size,), value)) == size
    assert components(torch.tensor([0.0, 0.0, 1e-3])) == 1
    assert components(torch.tensor([1.0, 0.9, -5.0, -5.0])) == 2
    assert components(torch.tensor([float("nan"), 0.0])) == 1


def searched(order: str) -> dict[str, int]:
    """Search with fixed weights: ``first`` needs three of its four components, any output of ``second`` is wrong."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in ("first", "second")})
    goal = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    report = inject(model, AutoLoRA(rank=4, alpha=12, order=order), ["first", "second"])  # type: ignore[arg-type]
    strengths = {"first": torch.ones(4), "second": torch.tensor([0.2, 1.0, 1.0, 1.0])}
    for name, strength in strengths.items():
        with torch.no_grad():
            trainable_parameters(model)[f"{name}.delta.A"].copy_(torch.eye(4))
            trainable_parameters(model)[f"{name}.delta.B"].copy_(torch.diag(strength))

    def loss(_: int) -> Tensor:
        first, second = (adapted_layers(model)[name].delta.change(torch.empty(0)) for name in ("first", "second"))  # type: ignore[union-attr]
        return (first - goal).square().sum() + second.square().sum()

    search = report.procedure
    search.problem = Problem(loss, loss, lambda: [(each, 1e-4) for each in trainable_parameters(model).values()])
    search.start(model)
    search._adam.param_groups[0]["lr"] = 0.05
    for step in range(60):
        search.after_step(step, 60)
    counts: dict[str, int] = search.counts()
    return counts


@pytest.mark.parametrize("order", ["first", "unrolled"])
def test_a_useless_layer_gets_a_lower_rank_than_one_that_matters(order: str) -> None:
    assert searched(order) == {"first": 3, "second": 1}


def two_layers(**options: Any) -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    return model, inject(model, AutoLoRA(**options), ["0", "1"]).procedure


def test_what_is_found_trains_as_a_lora_or_a_randlora() -> None:
    with pytest.raises(UserError, match="rank 8 is larger than the smaller side 6"):  # the default of other layers
        two_layers(rank={"1": 3})
    model, search = two_layers(rank={"0": 5, "1": 3}, alpha=15, dropout=0.1)
    with torch.no_grad():
        search.vectors[0][:2] = 1.0
    facts = search.finish()
    assert facts["search/mean"] == 2.5
    found = facts["search/adapter"]
    assert found["class_path"] == "LoRA"
    assert found["init_args"] == {"dropout": 0.1, "rank": {"^0": 2, "^1": 3}, "alpha": {"^0": 6.0, "^1": 15.0}}
    fresh = LoRA(**found["init_args"])
    assert inject(merge_and_unload(model), fresh, ["0", "1"]).trainable == 2 * (8 + 6) + 3 * (6 + 4)

    model, search = two_layers(rank=2, select="bases")
    with torch.no_grad():
        search.vectors[1][0] = 1.0
    found = search.finish()["search/adapter"]
    assert found["class_path"] == "RandLoRA"
    assert found["init_args"] == {"rank": 2, "alpha": 16.0, "num_bases": {"^0": 3, "^1": 1}}
    report = inject(merge_and_unload(model), RandLoRA(**found["init_args"]), ["0", "1"])
    assert report.trainable == 3 * (2 + 6) + 1 * (2 + 4)


def test_a_search_needs_losses_and_copies_have_none() -> None:
    model, search = two_layers(rank=3)
    for start in (lambda: None, lambda: search.start(model)):
        start()
        with pytest.raises(UserError, match="held-out samples"):
            search.after_step(0, 1)
    search.problem = Problem(lambda _: model(torch.ones(8)).sum(), lambda _: model(torch.ones(8)).square().sum())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.adapter_report.procedure.problem is None
        assert twin.adapter_report.procedure.vectors[0] is twin[0].delta.v
    search.problem.scale = lambda: float("inf")
    search.after_step(0, 1)  # an overflow in float16: no step
    assert not any(vector.any() for vector in search.vectors) and not search._adam.state
    search.problem.scale = lambda: 1.0
    search.after_step(0, 1)
    search.unrolled = True
    with pytest.raises(UserError, match="learning rates"):
        search.after_step(1, 2)
    with pytest.raises(UserError, match="num_bases pattern 'fc' matches none"):
        inject(nn.Sequential(nn.Linear(4, 4)), RandLoRA(rank=2, num_bases={"fc": 1}), ["0"])
