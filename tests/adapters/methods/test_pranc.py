"""PRANC: its random matrices, one by one; the formula is tested by the contract."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from randlora_pl.adapters import PRANC, inject
from randlora_pl.adapters.methods.random_matrices import PRANCDelta, SignSum, signed_places, signs
from randlora_pl.adapters.random_bases import WeightShape
from randlora_pl.adapters.select import match_budget
from tests.adapters.cases import adapted_one, assert_close
from tests.support.products import in_one_item

FORMS: list[Literal["shared", "dense"]] = ["shared", "dense"]


def update(form: Any, count: int, rows: int = 9, columns: int = 70, **options: Any) -> PRANCDelta:
    return adapted_one(PRANC(coefficients=count, form=form, **options), columns, rows, torch.float64)[1]


@torch.no_grad()
def matrices(delta: PRANCDelta) -> Tensor:
    """The R_i, (k, out, in): the updates of the unit vectors, without the scaling."""
    count, found = len(delta.alphas), []
    for unit in torch.eye(count, dtype=torch.float64):
        delta.alphas.copy_(unit)
        found.append(delta.change(torch.empty(0)) * (math.sqrt(count) / delta.alpha_scale))
    return torch.stack(found)


@in_one_item("chunk", [64, 150, 400, 800, 1 << 20])  # one row, two, all of one matrix, of two, and of all
def test_both_passes_have_the_same_matrices_for_every_size_of_chunk(chunk: int, monkeypatch: Any) -> None:
    """In the official code they differ where its two passes divide the coefficients in different ways."""
    seed, count, sizes = 5, 5, (5, 70)
    expected = signs(seed, torch.arange(count), torch.arange(5), 70)
    a = torch.zeros(count, requires_grad=True)
    monkeypatch.setattr("randlora_pl.adapters.methods.random_matrices.CHUNK", chunk)
    for i, unit in enumerate(torch.eye(count)):
        assert torch.equal(SignSum.apply(unit, seed, *sizes), expected[i].float())
    for p, q in [(0, 0), (4, 69), (2, 31), (2, 32)]:
        gradient = torch.autograd.grad(SignSum.apply(a, seed, *sizes)[p, q], a)[0]
        assert torch.equal(gradient, expected[:, p, q].float())
    assert torch.equal(signed_places(seed, 10, 96, a.device), signed_places(seed, 10, 99, a.device)[:96])


def test_an_entry_depends_on_its_place_alone() -> None:
    every = signs(3, torch.arange(6), torch.arange(9), 70)
    assert torch.equal(signs(3, torch.arange(2, 5), torch.arange(4, 7), 33), every[2:5, 4:7, :33])
    assert not torch.equal(signs(4, torch.arange(6), torch.arange(9), 70), every)
    model = nn.ModuleDict({"small": nn.Linear(20, 10), "large": nn.Linear(40, 30)})
    inject(model, PRANC(coefficients=50, form="dense"), [".*"])
    small, large = (matrices(layer.delta) for layer in model.values())  # type: ignore[arg-type]
    assert_close(small, large[:, :10, :20])
    inject(
        model := nn.ModuleDict({"small": nn.Linear(20, 10), "large": nn.Linear(40, 30)}), PRANC(coefficients=50), [".*"]
    )
    small, large = (matrices(layer.delta).flatten(1) for layer in model.values())  # type: ignore[arg-type]
    assert_close(small, large[:, :200])


@in_one_item("count", [1, 7, 64, 100, 629, 630])
def test_every_coefficient_is_shared_by_as_many_entries(count: int) -> None:
    r = matrices(update("shared", count))
    assert (r != 0).sum(0).eq(1).all(), "each entry belongs to one coefficient"
    assert (r != 0).flatten(1).sum(1).unique().tolist() in [[630 // count], [630 // count, 630 // count + 1]]


@in_one_item(("form", "count"), [(form, count) for form in FORMS for count in (30, 300)])
def test_the_update_has_full_rank(form: Any, count: int) -> None:
    delta = update(form, count, 24, 24)
    delta.alphas.data.normal_()
    assert torch.linalg.matrix_rank(delta.change(torch.empty(0))) == 24


def test_counts_and_budgets() -> None:
    shapes = [WeightShape("fc1", 30, 20), WeightShape("fc2", 20, 30)]
    assert [PRANC(coefficients=600).count(shape) for shape in shapes] == [600, 600]
    chosen, _ = match_budget(PRANC(match="lora:4"), shapes, nn.Linear(2, 2))
    assert isinstance(chosen, PRANC) and chosen.coefficients == 4 * 50
