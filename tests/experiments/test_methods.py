"""The comparison of methods: its settings, its cells, its table."""

import json
from pathlib import Path

import pytest
import yaml

from randlora_pl.cli.configs import find_config
from randlora_pl.cli.main import main
from randlora_pl.errors import UserError
from randlora_pl.experiments.methods import Cell, Comparison, baselines, compare, run_cell, table, tune

SMALL = {"dataset": "digits", "shots": 2, "steps": 2, "batch_size": 8}


@pytest.fixture
def small() -> Comparison:
    methods = {
        "RandLoRA-6": {"method": "RandLoRA"},
        "linear probe": {"task": "LinearHeadTask", "method": "LinearProbe"},
    }
    return Comparison({"name": "tiny"}, SMALL, methods, [1, 2], [1e-3, 1e-2])


def test_the_shipped_comparison_has_every_method_of_the_papers_vision_experiments() -> None:
    comparison = Comparison.read(find_config("compare_methods"))
    assert {facts["method"] for facts in comparison.methods.values()} == {
        "RandLoRA", "LoRA", "DoRA", "VeRA", "NoLA", "BitFit", "LinearProbe", "FullFineTuning",
    }  # fmt: skip
    assert comparison.data["shots"] == 16
    assert 0 not in comparison.seeds, "seed 0 is kept for choosing learning rates"


def test_cells_differ_by_seed_and_repeat(small: Comparison) -> None:
    first, before = run_cell(small, "RandLoRA-6", 1)
    again, _ = run_cell(small, "RandLoRA-6", 1)
    assert before is not None and 0 <= before <= 1
    assert (first.accuracy, first.trainable) == (again.accuracy, again.trainable)
    probe, none = run_cell(small, "linear probe", 1)
    assert none is None and probe.trainable < first.trainable


def test_baselines_are_those_of_scikit_learn_on_the_same_images(small: Comparison) -> None:
    found = {cell.method: cell.accuracy for cell in baselines(small, 1)}
    assert found.keys() == {"logistic regression (raw pixels)", "1-nearest neighbour (raw pixels)"}
    assert all(0.3 < accuracy < 0.9 for accuracy in found.values())


def test_compare_writes_the_table_and_the_cells(small: Comparison, tmp_path: Path) -> None:
    said: list[str] = []
    folder = compare(small, tmp_path / "out", said.append)
    cells = json.loads((folder / "cells.json").read_text())
    assert len(said) == 4
    assert len(cells) == 2 * (2 + 2 + 1)  # seeds x (methods, plain baselines, zero-shot)
    assert "| RandLoRA-6 | 149,424 |" in (folder / "table.md").read_text()
    assert yaml.safe_load((folder / "comparison.yaml").read_text())["seeds"] == [1, 2]


def test_table_has_mean_and_standard_error_in_order() -> None:
    lines = table([Cell("a", 1, 0.5), Cell("a", 2, 0.7), Cell("b", 1, 0.9, 10, 3.0)]).splitlines()
    assert lines[2].startswith("| b | 10 | 90.0 ± nan")
    assert "| a | - | 60.0 ± 10.0 | - |" in lines[3]


def test_tuning_reads_the_validation_split_with_a_seed_of_its_own(small: Comparison) -> None:
    with pytest.raises(UserError, match="tune with another"):
        tune(small, seed=1)
    found = tune(small.only(["RandLoRA-6"]), say=lambda line: None)
    assert set(found["RandLoRA-6"]) == {1e-3, 1e-2}


def test_bad_input_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("nothing: 1\n")
    for words, said in (
        (["--config", str(tmp_path / "bad.yaml")], "describes no comparison"),
        (["--methods", "RandLoRA"], "Did you mean 'RandLoRA-6'"),
        (["--seeds", "x"], "invalid int"),
        (["--output", str(tmp_path)], "nothing is overwritten"),
    ):
        assert main(["compare-methods", *words]) == 2
        assert said in capsys.readouterr().err
