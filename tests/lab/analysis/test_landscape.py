"""Points of the plane through three models, their losses, and the grid."""

import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from randlora_pl.adapters import merge
from randlora_pl.data import ImageData
from randlora_pl.data.unlabelled import batches, random_samples
from randlora_pl.lab.analysis.figures import write_figure
from randlora_pl.lab.analysis.models import (
    POSITIONS,
    Cell,
    Grid,
    Landscape,
    Plane,
    check_classes,
    coefficients,
    contour_figure,
    loss,
    low_path,
    stratified_fraction,
    weights_of,
)
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


def test_distances_and_other_tensors_that_are_refused() -> None:
    states = [{"a": torch.zeros(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)}]
    states.append({"a": torch.tensor([3.0, 4.0]), "b": torch.ones(1)})
    found = Plane({"a": torch.zeros(2), "b": torch.ones(1)}, states, POSITIONS["paper"]).distances()
    assert found == pytest.approx({"1-2": 2**0.5, "1-3": 5.0, "2-3": 13**0.5})
    with pytest.raises(UserError, match="tensors"):
        Plane(dict(states[0]), [*states[:2], {"a": torch.zeros(3), "b": torch.zeros(1)}], POSITIONS["paper"])


def test_a_loss_that_is_no_number_is_infinite() -> None:
    with two_blocks():
        task = make("linear head", "full")
        task.set_classes(CLASSES, TEMPLATES)
        task.adapt()
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


def digits(seed: int = 0) -> ImageData:
    data = ImageData(dataset="digits", image_size=32, seed=seed)
    data.setup()
    return data


def test_a_share_is_the_same_for_all_and_has_every_class() -> None:
    one, other = (stratified_fraction(digits(seed).samples("train"), 0.05, 7) for seed in (0, 1))
    assert list(one.keys) == list(other.keys) and len(one) == round(0.05 * 1294)
    counts = np.bincount(one.labels)
    assert len(counts) == 10 and counts.min() >= 6 and counts.max() <= 7
    assert list(stratified_fraction(digits().samples("train"), 0.05, 8).keys) != list(one.keys)
    assert len(stratified_fraction(one, 1e-9, 0)) == 1 and len(stratified_fraction(one, 1, 0)) == len(one)


def test_some_are_the_first_of_a_random_order() -> None:
    samples = digits().samples("test")
    few, more, every = (random_samples(samples, count, 0) for count in (10, 20, None))
    assert list(more.keys)[:10] == list(few.keys) and sorted(every.keys) == sorted(samples.keys)
    assert len(np.unique(few.labels)) > 3  # not one class after the other


def test_batches_are_of_nearly_equal_size_and_hold_each_image_once() -> None:
    data = digits()
    samples = random_samples(data.samples("test"), 45, 0)
    made = list(batches(data, samples, 20))
    assert [len(images) for images, _ in made] == [15, 15, 15]
    assert torch.equal(torch.cat([labels for _, labels in made]), torch.from_numpy(samples.labels))
    assert made[0][0].shape == (15, 3, 32, 32) and made[0][0].dtype == torch.float32
    test = next(iter(data.test_dataloader()))["image"]
    places = {name: place for place, name in enumerate(data.samples("test").keys)}
    torch.testing.assert_close(made[0][0][0], test[places[samples.keys[0]]])


def test_refusals() -> None:
    data = digits()
    with pytest.raises(UserError, match="no images"):
        next(batches(data, random_samples(data.samples("test"), 0, 0), 4))
    check_classes(data, list(data.classnames))
    with pytest.raises(UserError, match="--dataset"):
        check_classes(data, ["cat", "dog"])


GRID = Grid(13, 0.1)


def bowl(x: float, y: float) -> float:
    """A valley along x with a wall to the third model that is lowest far to the right; infinite in one corner."""
    wall = math.exp(-30 * (y - 0.5) ** 2) * (0.3 + 2 * (x - 1.1) ** 2)
    return math.inf if x < 0 and y > 1 else 0.2 + wall + 0.01 * x


def landscape() -> Landscape:
    corners = POSITIONS["paper"]
    losses = tuple(bowl(*corner) for corner in corners)
    heights = [[bowl(x, y) for x in GRID.values] for y in GRID.values]
    return Landscape(("LoRA", "RandLoRA", "FullFineTuning"), corners, losses, GRID, heights, "5 of 100 images")  # type: ignore[arg-type]


def test_paths_end_at_the_models_and_cross_where_the_wall_is_low() -> None:
    made = landscape()
    assert made.top == pytest.approx(1.2 * max(made.losses)), "heights are cut off above the shallowest minimum"
    paths = made.paths()
    for (i, j), path in paths.items():
        assert (path[0], path[-1]) == (GRID.nearest(made.corners[i]), GRID.nearest(made.corners[j]))
    values = GRID.values
    crossing = [values[column] for row, column in paths[0, 2] if abs(values[row] - 0.5) < 0.06]
    assert crossing and min(crossing) > 0.85
    found = made.barriers()
    assert found["LoRA - RandLoRA"] < 0.01 and 0.25 < found["LoRA - FullFineTuning"] < 0.4
    assert found.keys() == {"LoRA - RandLoRA", "RandLoRA - FullFineTuning", "LoRA - FullFineTuning"}


def test_contours_show_models_paths_and_the_cut(tmp_path: Path) -> None:
    figure = contour_figure(landscape())
    axes = figure.axes[0]
    markers = [line for line in axes.get_lines() if line.get_marker() not in ("None", "", None)]
    assert [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in markers] == list(POSITIONS["paper"])  # type: ignore[index]
    assert sum(line.get_linestyle() == "--" and len(line.get_xdata()) > 1 for line in axes.get_lines()) == 3  # type: ignore[arg-type]
    legend = axes.get_legend()
    assert legend is not None and "FullFineTuning: 0.2" in legend.get_texts()[-1].get_text()
    write_figure(figure, tmp_path, "picture")
    once = (tmp_path / "picture.svg").read_bytes()
    assert (tmp_path / "picture.png").stat().st_size > 10_000 and once.startswith(b"<?xml")
    write_figure(contour_figure(landscape()), tmp_path, "picture")
    assert (tmp_path / "picture.svg").read_bytes() == once


@pytest.mark.parametrize("height", [9.0, math.inf, 0.0])
def test_a_grid_that_misses_every_minimum_is_drawn(height: float) -> None:
    losses = (1.0, 1.0, 2.0) if height else (0.0, 0.0, 0.0)
    heights = [[height] * 4 for _ in range(4)]
    made = Landscape(("a", "b", "c"), POSITIONS["paper"], losses, Grid(4, 0.7), heights, "")
    assert height or set(made.barriers().values()) == {0.0}
    legend = contour_figure(made).axes[0].get_legend()
    assert legend is not None and f"c: {losses[2]:.4g}" in [text.get_text() for text in legend.get_texts()]


def test_barriers_are_above_the_models_own_losses() -> None:
    heights = [[5.0, 4.0, 5.0], [5.0, 3.0, 5.0], [5.0, 2.0, 5.0]]
    corners = POSITIONS["paper"]  # none of them is a point of the grid -1, 0.5, 2
    off = Landscape(("a", "b", "c"), corners, (1.0, 1.5, 2.0), Grid(3, 1.0), heights, "")
    assert off.barriers() == {"a - b": 1.5, "b - c": 1.0, "a - c": 1.0} and not off.on_grid
    on = Landscape(("a", "b", "c"), corners, (5.0, 5.0, 2.0), Grid(3, 0.0), heights, "")
    assert on.barriers() == {"a - b": 0.0, "b - c": 0.0, "a - c": 0.0} and on.on_grid


HEIGHTS = st.lists(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, math.inf]), min_size=3, max_size=3), min_size=3, max_size=3
)


def all_paths(start: Cell, end: Cell) -> list[list[Cell]]:
    """Every path without a repeated cell on a 3 x 3 map."""
    found, open_ = [], [[start]]
    while open_:
        path = open_.pop()
        if path[-1] == end:
            found.append(path)
            continue
        for cell in product(range(3), range(3)):
            if cell not in path and max(abs(cell[0] - path[-1][0]), abs(cell[1] - path[-1][1])) == 1:
                open_.append([*path, cell])
    return found


PATHS = {end: all_paths((0, 0), end) for end in ((0, 0), (0, 2), (2, 2), (1, 1))}


def top(heights: list[list[float]], path: list[Cell]) -> float:
    return max(heights[row][column] for row, column in path)


def length(path: list[Cell]) -> float:
    return sum(math.dist(a, b) for a, b in pairwise(path))


@given(HEIGHTS, st.sampled_from(sorted(PATHS)))
def test_no_path_climbs_less_and_none_that_climbs_as_little_is_shorter(heights: list[list[float]], end: Cell) -> None:
    path = low_path(heights, (0, 0), end)
    assert path in PATHS[end]
    lowest = min(top(heights, each) for each in PATHS[end])
    assert top(heights, path) == lowest
    shortest = min(length(each) for each in PATHS[end] if top(heights, each) == lowest)
    assert length(path) == pytest.approx(shortest)
