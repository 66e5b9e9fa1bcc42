"""Averages against a slow reference that reads the files itself."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.collect import read_sweep
from tests.lab.report.sweeps import DATASETS, METHODS, SIZES, description, write_sweep

B32, L14 = "CLIP-ViT-B/32", "CLIP-ViT-L/14"


def read_all(folder: Path) -> dict[tuple[str, ...], dict[int, float]]:
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for place in (folder / "cells").iterdir():
        labels = json.loads((place / "cell.json").read_text())
        if (place / "results.json").exists():
            key = tuple(labels[name] for name in ("model", "dataset", "budget", "method"))
            found.setdefault(key, {})[labels["seed"]] = (
                100 * json.loads((place / "results.json").read_text())["test/acc"]
            )
    return found


@pytest.mark.parametrize("model", [B32, L14])
@pytest.mark.parametrize("budget", ["1-shot", "4-shot", "16-shot", "100%"])
def test_averages_by_the_files(sweep: Sweep, folder: Path, model: str, budget: str) -> None:
    cells = read_all(folder)
    shared = [d for d in DATASETS if all((model, d, budget, m) in cells for m in METHODS)]
    assert sweep.common(model, budget)[0] == shared
    for method in METHODS:
        seeds = sorted(set.intersection(*(set(cells[model, d, budget, method]) for d in shared)))
        average = sweep.average(model, budget, method, tuple(shared))
        assert average is not None and average.seeds == tuple(seeds)
        by_seed = [fmean(cells[model, d, budget, method][seed] for d in shared) for seed in seeds]
        assert average.estimate.values == pytest.approx(by_seed)


def test_who_is_left_out_and_why(sweep: Sweep) -> None:
    assert sweep.common(B32, "16-shot") == ([d for d in DATASETS if d != "oxfordpets"], {"oxfordpets": ["NoLA"]})
    assert sweep.common(L14, "1-shot")[1] == {"eurosat": ["full fine-tuning"]}
    assert sweep.common(B32, "4-shot") == (DATASETS, {})  # a seed that failed leaves two others


def test_seeds_that_not_every_data_set_has(sweep: Sweep) -> None:
    average = sweep.average(B32, "4-shot", "RandLoRA-6", tuple(DATASETS))
    assert average is not None and average.seeds == (1, 3) and average.all_seeds == (1, 2, 3)
    assert len(average.estimate.values) == 2 and average.estimate.half is not None


def test_fewer_than_two_common_seeds_have_no_interval(tmp_path: Path) -> None:
    content = description(
        models={B32: {}}, datasets=["cars", "dtd"], budgets=[1], methods={"LoRA-32": METHODS["LoRA-32"]}
    )
    apart = {"cars": (1, 2), "dtd": (2, 3)}
    sweep = read_sweep(
        write_sweep(tmp_path, content, lambda cell: cell["seed"] in apart[cell["dataset"]], zeroshot=False)
    )
    average = sweep.average(B32, "1-shot", "LoRA-32", ("cars", "dtd"))
    cells = [sweep.by_seed(Key(B32, dataset, "1-shot", "LoRA-32")) for dataset in ("cars", "dtd")]
    assert average is not None and average.seeds == (2,) and average.estimate.half is None
    assert average.estimate.mean == pytest.approx(fmean(fmean(cell.values()) for cell in cells))


def test_a_method_without_any_run_is_not_compared(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, keep=lambda labels: labels["method"] != "NoLA"))
    assert sweep.common(B32, "1-shot") == (DATASETS, {})
    assert sweep.average(B32, "1-shot", "NoLA", tuple(DATASETS)) is None
    assert sweep.why_missing(Key(B32, "cars", "1-shot", "NoLA")) == "not run"


def test_data_sets_of_another_model_are_no_loss(tmp_path: Path) -> None:
    apart = {B32: "cars", L14: "dtd"}
    folder = write_sweep(tmp_path, keep=lambda labels: labels["dataset"] == apart[labels["model"]])
    (folder / "sweep.yaml").unlink()  # otherwise they are planned, and not run
    sweep = read_sweep(folder)
    assert sweep.common(B32, "1-shot") == (["cars"], {}) and sweep.common(L14, "1-shot") == (["dtd"], {})


def test_why_missing_tells_the_failure_first(sweep: Sweep) -> None:
    assert sweep.why_missing(Key(L14, "eurosat", "1-shot", "full fine-tuning")).startswith("failed: CUDA out of memory")
    assert sweep.why_missing(Key(B32, "oxfordpets", "16-shot", "NoLA")) == "not run"


def test_parameters_and_kinds(sweep: Sweep) -> None:
    assert {method: sweep.parameters(B32, method) for method in METHODS} == SIZES
    assert sweep.parameters(B32, "zero-shot") == 0 and sweep.parameters(B32, "unknown") is None
    assert sweep.kinds["LoRA-16"] == sweep.kinds["LoRA-32"] == "LoRA"
    assert sweep.family(B32) == "CLIP"
    plan = replace(sweep.plan, models={B32: {"family": "Family"}})
    assert replace(sweep, plan=plan).family(B32) == "Family"


def test_parameters_are_of_what_trains_and_was_counted(tmp_path: Path) -> None:
    counts = {"zero-shot": [151_277_313], "LoRA-32": [math.nan, math.nan, 7]}
    content = description(models={B32: {}}, datasets=["cars"], budgets=[1], methods={"LoRA-32": METHODS["LoRA-32"]})
    more = lambda labels: {"trainable_parameters": counts[labels["method"]][labels["seed"] - 1]}  # noqa: E731
    sweep = read_sweep(write_sweep(tmp_path, content, more=more))
    assert (sweep.parameters(B32, "zero-shot"), sweep.parameters(B32, "LoRA-32")) == (0, 7)
