"""The table of methods, its two plain classifiers, and the shipped sweeps that it is made of."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from randlora_pl.commands.sweep_job import find_sweep
from randlora_pl.lab.baselines import method_tables
from randlora_pl.lab.report.cells import Baseline, Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.sweep.expand import task_of
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.plan import Trial, plan
from randlora_pl.sweep.search import Search
from randlora_pl.tasks import ImageTask
from randlora_pl.utils.errors import UserError
from tests.sweep.grids import cells_of


def test_the_shipped_sweep_has_every_method_of_the_papers_vision_experiments() -> None:
    _, description = find_sweep("compare_methods")
    trained = [cell for cell in plan(description) if not cell.untrained]
    assert {cell.flat["model.adapter"].rpartition(".")[2] for cell in trained} == {
        "RandLoRA", "LoRA", "DoRA", "VeRA", "NoLA", "BitFit", "LinearProbe", "FullFineTuning",
    }  # fmt: skip
    assert {cell.flat["data.shots"] for cell in trained} == {16}
    assert not {0, *description.tune["seeds"]} & set(description.seeds), "seed 0 is kept for choosing learning rates"


def test_the_evidence_is_eight_datasets_with_five_seeds_and_some_of_them_are_searched() -> None:
    for name, methods, searched in (
        ("evidence", 19, {"mnist_5k", "fashion_mnist_unseen", "emoji_groups"}),
        ("evidence_texts", 12, {"films", "tweets scores"}),
    ):
        _, description = find_sweep(name)
        cells = plan(replace(description, seeds=description.seeds[:1]))
        trained = [cell for cell in cells if not cell.untrained]
        assert len(trained) == 8 * methods and len({cell.hash for cell in cells}) == len(cells)
        assert len(description.seeds) == 5
        search = Search(description, SweepFolder(Path("nowhere")))
        search.restrict("methods", ["LoRA"])
        assert len(search.known()) == 3 * len(searched)
        rates = search.space["learning_rate"]
        assert all(second / first == 2 for first, second in pairwise(rates)) and rates[-1] > 1
        assert {cell.labels.dataset for cell in search.known()} == searched
        assert len(description.pairs) <= 6, "with eight datasets more pairs can have no verdict: 7 * 2 / 2**8 > 0.05"
    assert sum(bool(cell.flat.get("data.scores")) for cell in cells) == len(cells) // 2


@pytest.mark.parametrize("name", ["compare_bases", "compare_bases_fashion"])
def test_bases_are_compared_over_five_seeds_at_one_rate(name: str) -> None:
    _, description = find_sweep(name)
    tasks = [task_of(cell.tree) for cell in plan(description) if cell.labels.seed == 1]
    assert all(isinstance(task, ImageTask) and task.learning_rate == 1e-3 for task in tasks)
    assert [task.adapter.options()["basis"] for task in tasks if task] == ["uniform", "hadamard"]
    assert len(description.seeds) == 5


def swept(folder: Path, cells: list[Trial], accuracies: dict[str, float], tuned: Any = None, **facts: float) -> Sweep:
    """The sweep of some cells that are finished; without an accuracy it is 50 with the first seed, 70 with the next."""
    for cell in cells:
        place = folder / "cells" / cell.hash
        place.mkdir(parents=True, exist_ok=True)
        (place / "cell.json").write_text(json.dumps(cell.labels._asdict()))
        accuracy = accuracies.get(cell.labels.method, 30.0 + 20 * cell.labels.seed) / 100
        (place / "results.json").write_text(json.dumps({"test/acc": accuracy, "finished": True} | facts))
    content = {name: list(dict.fromkeys(getattr(cell.labels, name[:-1]) for cell in cells)) for name in GRID}
    methods = {name: OPTIONS.get(name, {"adapter": "LoRA"}) for name in sorted({cell.labels.method for cell in cells})}
    content |= {"models": {"tiny": {"config": "tiny_clip"}}, "methods": methods}
    content["budgets"] = [budget for budget in content["budgets"] if budget != "zero-shot"]
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content | ({"tuned": tuned} if tuned else {}), sort_keys=False))
    return read_sweep(folder)


GRID = ("datasets", "budgets", "seeds")
OPTIONS: dict[str, dict[str, Any]] = {
    "a": {"adapter": "RandLoRA", "learning_rate": 1e-2},
    "c": {"adapter": "VeRA"},
    "zero-shot": {},
}


def test_table_has_mean_and_standard_error_and_rates_but_no_ranking(tmp_path: Path) -> None:
    cells = cells_of(
        methods={name: OPTIONS.get(name, {"adapter": "LoRA"}) for name in ("a", "b", "c", "zero-shot")}, seeds=[1, 2]
    )
    facts = {"trainable_parameters": 1_000, "fit_seconds": 4.0, "learning_rate": 1e-3}
    sweep = swept(tmp_path, cells, {"b": 90.0, "c": 1.0, "zero-shot": 3.0}, **facts)
    text = method_tables(sweep, [cell for cell in cells if cell.labels.method != "c"])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in lines] == [
        "method", "logistic regression (raw pixels)", "1-nearest neighbor (raw pixels)", "a", "b", "zero-shot",
    ]  # fmt: skip
    assert lines[3] == "| a | 1,000 | 0.01 | typed | 60.0 ± 10.0 | 4 |"
    assert lines[4] == "| b | 1,000 | 0.001 | default | 90.0 ± 0.0 | 4 |"
    assert lines[5] == "| zero-shot | - | - | - | 3.0 | 4 |"
    assert "not a ranking" in text and "2-shot" in text and "**" not in "".join(lines)


def test_plain_classifiers_are_measured_once_and_an_error_leaves_the_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cells = cells_of(methods={"a": {"adapter": "LoRA"}}, seeds=[1, 2])

    def fails(cell: Trial) -> None:
        raise UserError("the folder has no test texts")

    monkeypatch.setattr("randlora_pl.lab.baselines.baselines_of", fails)
    sweep = swept(tmp_path / "few", cells, {"a": 50.0})
    text = method_tables(sweep, cells)
    assert "| a | " in text and "raw pixels" not in text
    assert caplog.messages == ["no baselines for digits: the folder has no test texts"]
    sweep.baselines = [
        Baseline("digits", "2-shot", seed, "x (raw pixels)", 0.1 + 0.2 * seed, 20, 20) for seed in (1, 2)
    ]
    assert "| x (raw pixels) | - | - | - | 40.0 ± 10.0 | - |" in method_tables(sweep, cells)
    whole = cells_of(methods={"a": {"adapter": "LoRA"}}, seeds=[1, 2], budgets=["100%"])
    sweep = swept(tmp_path / "whole", whole, {"a": 50.0})
    sweep.baselines = [Baseline("digits", "100%", 1, "x (raw pixels)", 0.3, 20, 20)]  # as for every other seed
    assert "| x (raw pixels) | - | - | - | 30.0 | - |" in method_tables(sweep, whole)


def test_a_rate_that_was_searched_is_called_so(tmp_path: Path) -> None:
    (cell,) = cells_of(methods={"a": OPTIONS["a"]})
    found = {"method": OPTIONS["a"], "chosen": {"learning_rate": 1e-2}}
    tuned = {"finished": True, "models": {"": {"config": "tiny_clip"}}, "methods": {"a": found}}
    for finished, how in ((True, "validation"), (False, "typed")):
        sweep = swept(tmp_path, [cell], {"a": 50.0}, tuned | {"finished": finished})
        assert f"| 0.01 | {how} |" in method_tables(sweep, [cell])
