"""AdamW's groups and the schedule of the protocol."""

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from randlora_pl.adapters import DeltaWeight
from randlora_pl.adapters.layers import WeightedSum
from randlora_pl.adapters.operations import rates_of
from randlora_pl.tasks import AdaptationModule
from randlora_pl.tasks.optim import (
    epoch_factor,
    parameter_groups,
    schedule_factor,
    set_learning_rates,
)

from .small import make


def cosine(total: int) -> list:
    """Factors of two groups in a run without warm-up."""
    return [lambda step: schedule_factor(step, total, 0, 0.01)] * 2


RUNS = st.tuples(st.integers(1, 3000), st.integers(0, 200), st.floats(0, 1))


@given(RUNS)
def test_schedule_rises_to_one_then_falls_to_the_final_fraction(run: tuple[int, int, float]) -> None:
    total, warmup, final = run
    factors = [schedule_factor(step, total, warmup, final) for step in range(max(total, warmup) + 2)]
    assert all(0 < factor <= 1 or factor == pytest.approx(final) for factor in factors)
    assert factors[warmup] == 1
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert factors[-1] == pytest.approx(final, abs=1e-12)
    steps = [after - before for before, after in pairwise(factors[: warmup + 1])]
    assert all(step == pytest.approx(1 / (warmup + 1)) for step in steps)  # linear


def test_cosine_is_half_way_in_the_middle() -> None:
    assert schedule_factor(50, 100, 0, 0.01) == pytest.approx(0.505)
    assert schedule_factor(60, 100, 20, 0.01) == pytest.approx(0.505)


def test_groups_leave_out_what_is_frozen_and_decay_as_asked() -> None:
    layer, norm, frozen = nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False)
    scalar = nn.Parameter(torch.zeros(()))
    parameters = [*layer.parameters(), *norm.parameters(), *frozen.parameters(), scalar]
    everything = parameter_groups(parameters, 0.5, 0.1, True)
    spared = parameter_groups(parameters, 0.5, 0.1, False)
    for groups, decays in ((everything, [0.1, 0.1]), (spared, [0.1, 0.0])):
        matrices, vectors = groups
        assert [group["weight_decay"] for group in groups] == decays
        assert [group["lr"] for group in groups] == [0.5, 0.5]
        assert matrices["params"] == [layer.weight]
        assert {id(p) for p in vectors["params"]} == {id(p) for p in (layer.bias, *norm.parameters(), scalar)}


def test_tensors_of_other_rates_come_last_and_nested_rates_multiply() -> None:
    """A step of AdamW by hand: the first moves each entry by its group's rate, and decays it by rate x decay."""
    first, second, third = (_Scaled(rate) for rate in (3.0, 0.5, 1.0))
    outer = WeightedSum([first, second, third], [1.0, 1.0, 1.0])
    outer.rates = {"parts.0": 0.5, "parts.2.vector": 4.0}
    found = {first.matrix: 1.5, first.vector: 0.5, second.matrix: 0.5, third.matrix: 1.0, third.vector: 4.0}
    assert rates_of(outer) == found
    factors, own = rates_of(outer), [*outer.parameters(), *nn.Linear(2, 2).parameters()]
    groups = parameter_groups(own, 0.1, 0.5, False, factors)
    plain = [each for each in own if factors.get(each, 1.0) == 1]
    without = parameter_groups(plain, 0.1, 0.5, False)
    assert str(groups[:2]) == str(without) and groups[0]["params"][0] is third.matrix  # as without any rates
    others = [(0.05, 0.5), (0.05, 0.0), (0.15, 0.5), (0.4, 0.0)]
    assert [(group["lr"], group["weight_decay"]) for group in groups[2:]] == [pytest.approx(each) for each in others]
    optimizer = AdamW(groups)
    for each in own:
        each.grad = torch.ones_like(each)
    with torch.no_grad():
        first.matrix.fill_(2.0)
    optimizer.step()
    torch.testing.assert_close(first.matrix.detach(), torch.full((2, 2), 2 * (1 - 0.15 * 0.5) - 0.15))


class _Scaled(DeltaWeight):
    """An update with a rate for its matrix."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.matrix, self.vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
        self.rates = {"matrix": rate}


def test_typed_rates_beat_restored_ones_at_the_same_step() -> None:
    layer = nn.Linear(2, 2)

    def make(rate: float, total: int, decay: bool) -> tuple:
        groups = parameter_groups(layer.parameters(), rate, 0.1, decay)
        optimizer = AdamW([dict(group) for group in groups])
        return optimizer, LambdaLR(optimizer, cosine(total)), groups

    saved_optimizer, saved_scheduler, saved_groups = make(1.0, 10, True)
    for _ in range(5):
        saved_optimizer.step()
        saved_scheduler.step()
    before = [dict(group) for group in saved_optimizer.param_groups]
    set_learning_rates(saved_optimizer, saved_scheduler, saved_groups)  # the same run: nothing changes
    assert [dict(group) for group in saved_optimizer.param_groups] == before

    optimizer, scheduler, groups = make(0.5, 20, False)
    optimizer.load_state_dict(saved_optimizer.state_dict())
    scheduler.load_state_dict(saved_scheduler.state_dict())
    assert optimizer.param_groups[0]["lr"] == before[0]["lr"]  # what PyTorch does
    set_learning_rates(optimizer, scheduler, groups)
    assert optimizer.param_groups[0]["lr"] == 0.5 * schedule_factor(5, 20, 0, 0.01)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[1]["lr"] == 0.5 * schedule_factor(6, 20, 0, 0.01)


def test_rates_per_epoch_and_a_step_of_sgd_by_hand() -> None:
    """Epoch 0 has 1e-5 in all groups; SGD adds the decay to the gradient, and the last step's momentum."""
    assert [epoch_factor(0, 4, rate) * rate for rate in (2e-3, 0.02275)] == pytest.approx([1e-5, 1e-5])
    falling = [epoch_factor(epoch, 4, 0.5) for epoch in range(1, 4)]
    assert falling == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5])
    weight = nn.Parameter(torch.tensor([[2.0, -4.0]]))
    groups = parameter_groups([weight], 0.1, 0.5, True)
    task = make("vision-language")  # with SGD, which learned prompts offer
    task.optimizer, task.optimizer_groups, task.rate_factors = "sgd", lambda: groups, lambda groups: [lambda _: 1.0]
    module = AdaptationModule(task)
    module._trainer = SimpleNamespace(precision_plugin=None)
    made: Any = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    for expected in ([[1.8, -3.9]], [[1.43, -3.715]]):  # 2 - .1 (1 + 1) = 1.8, 1.8 - .1 (.9 * 2 + 1 + .9) = 1.43
        weight.grad = torch.tensor([[1.0, 1.0]])
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.tensor(expected))
    set_learning_rates(optimizer, scheduler, [groups[0] | {"lr": 0.2}])
    assert optimizer.param_groups[0]["lr"] == 0.2 and "eps" not in optimizer.param_groups[0]
