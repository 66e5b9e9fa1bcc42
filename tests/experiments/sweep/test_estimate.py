import json
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.experiments.sweep.estimate import COUNTED, MEASURED, Estimator, planned_steps
from randlora_pl.experiments.sweep.folder import SweepFolder
from randlora_pl.experiments.sweep.plan import Cell
from tests.experiments.sweep.grids import GRID, cells_of

CELLS = cells_of(seeds=[1, 2], budgets=[2, 4], datasets={"digits": None, "long": {"dataset": "digits", "steps": 20}})


def finish(folder: SweepFolder, cell: Cell, **figures: Any) -> None:
    (folder.begin(cell) / "results.json").write_text(json.dumps({"finished": True} | figures))


def test_measured_from_the_nearest_finished_cells(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    estimator = Estimator(folder, CELLS, lambda: 1e9)
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


def test_counted_from_parameters_and_operations(tmp_path: Path) -> None:
    cells = cells_of(methods={"few": {"adapter": "LoRA", "rank": 4}, "all": {"adapter": "FullFineTuning"}})
    slow, fast = (Estimator(SweepFolder(tmp_path), cells, lambda speed=speed: speed) for speed in (1e9, 1e10))  # type: ignore[misc]
    few, everything = slow(cells[0]), slow(cells[1])
    assert few.seconds and everything.seconds and few.bytes and everything.bytes
    assert slow(cells[0]).seconds == pytest.approx(10 * (fast(cells[0]).seconds or 0))
    assert everything.bytes > 3 * few.bytes, "gradients and moments of all weights"


def test_an_untrained_model_is_only_tested(tmp_path: Path) -> None:
    cells = cells_of(methods=GRID["methods"] | {"zero-shot": None}, set=GRID["set"] | {"data.steps": 10_000})
    estimator = Estimator(SweepFolder(tmp_path), cells, lambda: 1e9)
    zero, trained = estimator(cells[0]), estimator(cells[1])
    assert cells[0].untrained and zero.seconds and trained.seconds and zero.seconds < trained.seconds / 10


def test_nothing_is_known_of_images_that_nobody_counted(tmp_path: Path) -> None:
    base = {key: value for key, value in GRID["set"].items() if key != "data.steps"}
    (cell, _) = cells_of(datasets={"mine": {"dataset": "folder", "root": "x"}}, budgets=["100%"], set=base)
    estimate = Estimator(SweepFolder(tmp_path), [cell], lambda: 1e9)(cell)
    assert planned_steps(cell) is None and estimate.seconds is None and estimate.bytes
