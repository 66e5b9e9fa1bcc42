import json
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.sweep.estimate import COUNTED, MEASURED, Estimator
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.plan import Trial
from randlora_pl.sweep.steps import evaluated_samples, planned_steps
from tests.sweep.grids import GRID, cells_of

CELLS = cells_of(seeds=[1, 2], budgets=[2, 4], datasets={"digits": None, "long": {"dataset": "digits", "steps": 20}})


def finish(folder: SweepFolder, cell: Trial, **figures: Any) -> None:
    (folder.begin(cell) / "results.json").write_text(json.dumps({"finished": True} | figures))


def test_measured_from_the_nearest_finished_cells(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    estimator = Estimator(folder, CELLS)
    first, second, other = CELLS[0], CELLS[4], next(c for c in CELLS if c.labels.dataset == "long")
    assert first.labels._replace(seed=2) == second.labels and other.labels.method == first.labels.method
    assert estimator(first).source == COUNTED
    finish(folder, first, fit_seconds=6.0, steps=2, cell_seconds=10.0, peak_memory_bytes=5)
    estimator.refresh()
    same, longer = estimator(second), estimator(other)
    assert (same.seconds, same.bytes, same.source) == (10.0, 5, MEASURED)
    assert longer.seconds == pytest.approx(20 * 3.0 + 4.0) and longer.source == MEASURED
    finish(folder, second, fit_seconds=12.0, steps=2, cell_seconds=16.0, peak_memory_bytes=7)
    estimator.refresh()
    assert estimator(first).seconds == pytest.approx(13.0) and estimator(first).bytes == 7


def test_steps_are_of_both_stages(tmp_path: Path) -> None:
    first = {"adapter": "LoRA", "set": {"data.steps": 3}}
    cells = cells_of(
        methods={"LoRA": {"adapter": "LoRA"}, "two": {"adapter": "RandLoRA", "first": first}}, seeds=[1, 2]
    )
    folder = SweepFolder(tmp_path)
    alone, two = (next(cell for cell in cells if cell.labels.method == name) for name in ("LoRA", "two"))
    (steps,) = {planned_steps(cell.tree) for cell in cells}
    assert steps is not None
    estimator = Estimator(folder, cells)
    finish(folder, alone, fit_seconds=6.0, steps=2, cell_seconds=10.0)
    estimator.refresh()
    assert estimator(two).seconds == pytest.approx(4.0 + (3 + steps) * 3.0)
    finish(folder, two, **{"fit_seconds": 4.0, "first/fit_seconds": 6.0, "steps": 2, "cell_seconds": 13.0})
    estimator.refresh()
    assert estimator(cells[-1]).seconds == pytest.approx(3.0 + (3 + steps) * 10.0 / 5)


def test_memory_is_counted_from_parameters_and_time_is_unknown(tmp_path: Path) -> None:
    methods = {"zero-shot": None, "few": {"adapter": "LoRA", "rank": 4}, "all": {"adapter": "FullFineTuning"}}
    cells = cells_of(methods=methods)
    zero, few, everything = map(Estimator(SweepFolder(tmp_path), cells), cells)
    assert zero.bytes and few.bytes and everything.bytes and zero.seconds is few.seconds is None
    assert zero.bytes < few.bytes and 3 * few.bytes < everything.bytes, "gradients and moments of all weights"


def test_nothing_is_known_of_images_that_nobody_counted(tmp_path: Path) -> None:
    base = {key: value for key, value in GRID["set"].items() if key != "data.steps"}
    (cell, _) = cells_of(datasets={"mine": {"dataset": "folder", "root": "x"}}, budgets=["100%"], set=base)
    estimate = Estimator(SweepFolder(tmp_path), [cell])(cell)
    assert planned_steps(cell.tree) is None and estimate.bytes


def test_steps_and_images_of_half_of_the_classes() -> None:
    data = {"dataset": "dtd", "split": "coop", "shots": 16, "epochs": 2, "batch_size": 8}
    tree = {"model": {"class_path": "randlora_pl.tasks.VisionLanguageTask"}, "data": data}
    assert planned_steps(tree) == 2 * 47 * 16 // 8 and evaluated_samples(tree) == 1_692
    half = tree | {"data": data | {"classes": "base"}}
    assert planned_steps(half) == 2 * 24 * 16 // 8 and evaluated_samples(half) == 864  # in proportion
    assert evaluated_samples(tree | {"data": {"dataset": "imagenet_a"}}) == 7_500
    assert planned_steps(tree | {"data": {"dataset": "imagenet_a"}}) is None
