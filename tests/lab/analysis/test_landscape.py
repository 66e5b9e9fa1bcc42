"""Points of the plane through three models, their losses, and the grid."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora_pl.adapters import merge
from randlora_pl.lab.analysis.landscape import POSITIONS, Grid, Plane, coefficients, loss, weights_of
from randlora_pl.utils.errors import UserError
from tests.tasks.small import CLASSES, TEMPLATES, built, images, make, shake, two_blocks

METHODS = {"lora": 0.05, "randlora": 0.05, "full": 0.01}


@pytest.mark.parametrize("positions", POSITIONS)
def test_corners_are_exact(positions: str) -> None:
    corners = POSITIONS[positions]
    assert [coefficients(*corner, corners) for corner in corners] == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]


@given(st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(sorted(POSITIONS)))
def test_coefficients_sum_to_one_and_give_the_point(x: float, y: float, positions: str) -> None:
    corners = POSITIONS[positions]
    shares = coefficients(x, y, corners)
    assert sum(shares) == pytest.approx(1)
    for axis, value in enumerate((x, y)):
        assert sum(share * corner[axis] for share, corner in zip(shares, corners, strict=True)) == pytest.approx(
            value, abs=1e-9
        )
    if positions == "paper":  # as the official code writes them, with its models in another order
        assert shares == pytest.approx((1 - x - 0.5 * y, x - 0.5 * y, y), abs=1e-12)


def test_equilateral_means_equal_sides() -> None:
    a, b, c = (torch.tensor(corner) for corner in POSITIONS["equilateral"])
    assert float((a - b).norm()) == pytest.approx(float((b - c).norm())) == pytest.approx(float((a - c).norm()))


def tasks(kind: str) -> list[Any]:
    made = []
    with two_blocks():
        for method, scale in METHODS.items():
            task = built(kind, method)
            shake(task, scale)
            task.eval()
            made.append(task)
    return made


def own_loss(task: Any, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The loss that the task's own evaluation computes, its adapter in place."""
    task.prepare_evaluation()
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(task.class_logits(x).float(), y, reduction="none") for x, y in batches
        ]
    task.finish_evaluation()
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("kind", ["vision-language", pytest.param("text head", marks=pytest.mark.full), "linear head"])
def test_corners_reproduce_the_runs_and_edges_their_mixtures(kind: str) -> None:
    batches = [(images(6), torch.tensor([0, 1, 2, 3, 0, 1])), (images(2).flip(3), torch.tensor([2, 3]))]
    models = tasks(kind)
    own = [own_loss(task, batches) for task in models]
    states = [{name: value.clone() for name, value in weights_of(task).items()} for task in models]
    if kind == "linear head":
        assert "head/head" in states[0]
    carrier = models[0]
    plane = Plane(weights_of(carrier), states, POSITIONS["paper"])
    for corner, expected in zip(POSITIONS["paper"], own, strict=True):
        plane.write_point(*corner)
        assert loss(carrier, batches) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in own}) == 3  # or this would show nothing
    plane.write_point(0.2, 0.6)  # shares 0.5, -0.1 and 0.6
    middle = loss(carrier, batches)
    for name, value in weights_of(carrier).items():
        slow = 0.5 * states[0][name] - 0.1 * states[1][name] + 0.6 * states[2][name]
        torch.testing.assert_close(value, slow, atol=1e-5, rtol=1e-4)
    assert middle not in own
    plane.write_point(*POSITIONS["paper"][1])  # and back
    assert loss(carrier, batches) == pytest.approx(own[1], abs=1e-5)


def test_a_plane_through_tasks_leaves_two_of_them_as_they_are() -> None:
    batches = [(images(6), torch.tensor([0, 1, 2, 3, 0, 1]))]
    models = tasks("vision-language")
    own = [own_loss(task, batches) for task in models]
    plane = Plane.through(models, POSITIONS["equilateral"])
    for point in ((0.3, 1.4), *POSITIONS["equilateral"]):
        plane.write_point(*point)
        assert [loss(task, batches) for task in models[1:]] == pytest.approx(own[1:], abs=1e-5)
    assert loss(models[0], batches) == pytest.approx(own[2], abs=1e-5)
    plane.write_point(*POSITIONS["equilateral"][0])
    assert loss(models[0], batches) == pytest.approx(own[0], abs=1e-5)


def test_distances() -> None:
    states = [{"a": torch.zeros(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)}]
    states.append({"a": torch.tensor([3.0, 4.0]), "b": torch.ones(1)})
    found = Plane({"a": torch.zeros(2), "b": torch.ones(1)}, states, POSITIONS["paper"]).distances()
    assert found == pytest.approx({"1-2": 2**0.5, "1-3": 5.0, "2-3": 13**0.5})


def test_other_tensors_are_refused() -> None:
    one, other = {"a": torch.zeros(2)}, {"a": torch.zeros(3), "b": torch.zeros(1)}
    with pytest.raises(UserError, match="tensors"):
        Plane(dict(one), [one, one, other], POSITIONS["paper"])


def test_a_loss_that_is_no_number_is_infinite() -> None:
    with two_blocks():
        task = make("linear head", "full")
        task.set_classes(CLASSES, TEMPLATES)
        task.configure_model()
    task.eval()
    merge(task.model)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.mul_(1e30)
    assert loss(task, [(images(4), torch.tensor([0, 1, 2, 3]))]) == float("inf")


def test_the_paper_s_corners_are_points_of_the_usual_grid() -> None:
    grid = Grid()
    assert len(grid.values) == 25 and grid.values[0] == -0.7 and grid.values[-1] == 1.7
    for x, y in POSITIONS["paper"]:
        row, column = grid.nearest((x, y))
        assert (grid.values[column], grid.values[row]) == (x, y)
