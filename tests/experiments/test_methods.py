"""The comparison of methods: its settings, its cells, its table."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from randlora_pl.experiments.comparison import Comparison

from randlora_pl.cli.main import main
from randlora_pl.config.compose import read_config
from randlora_pl.config.shipped import find_config
from randlora_pl.experiments import methods
from randlora_pl.experiments.methods import (
    Cell,
    baselines,
    best_rates,
    compare,
    provenance,
    run_cell,
    table,
    tune,
    zero_shot,
)
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.tasks.small import two_blocks

SMALL = {"dataset": "digits", "shots": 2, "steps": 2, "batch_size": 8}


@pytest.fixture(autouse=True)
def _small_model() -> Iterator[None]:
    torch.set_num_threads(1)
    with two_blocks():
        yield


@pytest.fixture
def small() -> Comparison:
    methods = {
        "RandLoRA-6": {"method": "RandLoRA"},
        "linear probe": {"task": "LinearHeadTask", "method": "LinearProbe"},
    }
    return Comparison({"name": "tiny", "pretrained": "random"}, SMALL, methods, [1, 2], [1e-3, 1e-2])


def test_the_shipped_comparison_has_every_method_of_the_papers_vision_experiments() -> None:
    comparison = Comparison.of(read_config(find_config("compare_methods")), find_config("compare_methods"))
    assert {facts["method"] for facts in comparison.methods.values()} == {
        "RandLoRA", "LoRA", "DoRA", "VeRA", "NoLA", "BitFit", "LinearProbe", "FullFineTuning",
    }  # fmt: skip
    assert comparison.data["shots"] == 16
    assert 0 not in comparison.seeds, "seed 0 is kept for choosing learning rates"


@pytest.mark.parametrize("name", ["compare_bases", "compare_bases_fashion"])
def test_bases_are_compared_over_five_seeds_at_one_rate(name: str) -> None:
    comparison = Comparison.of(read_config(find_config(name)), find_config(name))
    tasks = [comparison.task(method, 1) for method in comparison.methods]
    assert [task.adapter.options()["basis"] for task in tasks] == ["uniform", "hadamard"]
    assert {task.learning_rate for task in tasks} == {1e-3} and len(comparison.seeds) == 5


def test_cells_differ_by_seed_and_repeat(small: Comparison) -> None:
    first, again = (run_cell(small, "RandLoRA-6", 1) for _ in range(2))
    assert (first.accuracy, first.trainable) == (again.accuracy, again.trainable)
    assert run_cell(small, "linear probe", 1).trainable < first.trainable


def test_zero_shot_is_tested_once_for_a_seed(small: Comparison) -> None:
    (cell,) = zero_shot(small, 1)
    assert cell.method == "zero-shot" and 0 <= cell.accuracy <= 1
    assert not list(zero_shot(small.only(["linear probe"]), 1))


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
    assert "| RandLoRA-6 | " in (folder / "table.md").read_text()
    assert yaml.safe_load((folder / "comparison.yaml").read_text())["seeds"] == [1, 2]


def test_table_has_mean_and_standard_error_and_rates_but_no_ranking() -> None:
    lines = table([Cell("a", 1, 0.5), Cell("a", 2, 0.7), Cell("b", 1, 0.9, 10, 3.0, 1e-3, "typed")]).splitlines()
    assert lines[2] == "| a | - | - | - | 60.0 ± 10.0 | - |"
    assert lines[3] == "| b | 10 | 0.001 | typed | 90.0 | 3 |"
    assert "ranks nothing" in lines[-1]


def test_how_a_rate_was_chosen(small: Comparison, tmp_path: Path) -> None:
    assert small.rate("RandLoRA-6") == (1e-3, "default")
    facts = small.methods["RandLoRA-6"] | {"learning_rate": 1e-2}
    tuned = provenance(small, {"RandLoRA-6": {1e-3: [0.5], 1e-2: [0.6]}}) | {"finished": True}
    (tmp_path / "tuning.json").write_text(json.dumps(tuned))
    content = {"model": small.model, "data": small.data, "methods": {"RandLoRA-6": facts}}
    assert Comparison.of(content, tmp_path / "c.yaml").rate("RandLoRA-6") == (1e-2, "typed")
    named = Comparison.of(content | {"tuned": "tuning.json"}, tmp_path / "c.yaml")
    assert named.rate("RandLoRA-6") == (1e-2, "validation")
    changed = replace(named, methods={"RandLoRA-6": facts | {"learning_rate": 3e-2}})
    assert changed.rate("RandLoRA-6") == (3e-2, "typed")


def test_tuning_reads_the_validation_split_with_a_seed_of_its_own(
    small: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="contain"):
        tune(replace(small, tuning_seeds=[0, 1]), tmp_path)
    with pytest.raises(UserError, match="learning_rates"):
        tune(replace(small, learning_rates=[]), tmp_path)
    splits: list[str] = []
    plain = methods._evaluate
    monkeypatch.setattr(methods, "_evaluate", lambda *args: (splits.append(args[2]), plain(*args))[1])
    small = replace(small, learning_rates=[1e-9, 1e-3, 1e-2], tuning_seeds=[0, 4])
    found = tune(small, tmp_path, say=lambda line: None)
    for rates in found.values():
        assert set(rates) == {1e-9, 1e-3, 1e-2}
        assert sorted(map(len, rates.values())) == [1, 2, 2], "the two best with every seed"
        assert min(r[0] for r in rates.values() if len(r) == 2) >= max(r[0] for r in rates.values() if len(r) == 1)
    assert set(splits) == {"val"}
    kept = json.loads((tmp_path / "tuning.json").read_text())
    assert kept["finished"] and kept["seeds"] == [0, 4]
    for name, rates in found.items():
        tried = kept["methods"][name]["tried"]
        option = small.tuned_option(name)
        assert {entry[option]: list(entry["val/acc"].values()) for entry in tried} == rates


def test_linear_probe_is_tuned_by_the_rate_that_it_has(small: Comparison) -> None:
    assert [small.tuned_option(name) for name in small.methods] == ["learning_rate", "head_learning_rate"]


def test_best_rates_are_lines_of_a_config(small: Comparison) -> None:
    found = {
        "RandLoRA-6": {1e-3: [0.5, 0.5], 1e-2: [0.7, 0.7], 1e-1: [0.9]},
        "linear probe": {1e-2: [0.9], 1e-3: [0.9]},
    }
    read = yaml.safe_load("methods:\n" + best_rates(small, found))["methods"]
    assert read["RandLoRA-6"] == {"method": "RandLoRA", "learning_rate": 1e-2}
    assert read["linear probe"]["head_learning_rate"] == 1e-3, "of equal ones the lowest"


GOOD = "model: {name: tiny, pretrained: random}\ndata: {dataset: digits, shots: 2, steps: 1, batch_size: 8}\n"


@in_one_item(
    ("text", "said"),
    [
        ("nothing: 1", "describes no comparison"),
        ("methods: 5", "describes no comparison"),
        (GOOD + "methods: {}", "methods is {}"),
        (GOOD + "methods: {a: LoRA}", "methods.a is 'LoRA'"),
        (GOOD + "methods: {a: {method: LoRa}}", "a: method 'LoRa' is unknown"),
        (GOOD + "methods: {a: {method: LoRA, task: X}}", "there is no task 'X'"),
        (GOOD + "methods: {a: {method: LoRA, options: {rang: 1}}}", "rang"),
        (GOOD + "methods: {a: {method: LoRA, options: {rank: 9999}}}", "a: LoRA: rank 9999 is larger"),
        (GOOD + "methods: {a: {method: LoRA, lerning_rate: 1}}", "Did you mean 'learning_rate'"),
        (GOOD + "methods: {a: {method: LoRA, learning_rate: fast}}", "a: VisionLanguageTask does not take"),
        (GOOD + "methods: {a: {method: LinearProbe}}", "give it task: LinearHeadTask"),
        (GOOD + "seeds: [x]\nmethods: {a: {method: LoRA}}", "seeds is ['x']"),
        (GOOD.replace("shots", "shot") + "methods: {a: {method: LoRA}}", "Did you mean 'shots'"),
        (GOOD.replace("digits", "mnist, root: nowhere") + "methods: {a: {method: LoRA}}", "nowhere"),
    ],
)
def test_bad_comparisons_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    assert main(["compare-methods", "--config", "bad.yaml"]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) <= 2
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_bad_words_are_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for words, said in (
        (["--methods", "RandLoRA"], "Did you mean 'RandLoRA-6'"),
        (["--seeds", "x"], "invalid int"),
        (["--seeds", "1", "--tune"], "leave out --seeds"),
        (["--methods", "BitFit", "--output", str(tmp_path)], "nothing is overwritten"),
        (["--methods", "BitFit", "--output", str(tmp_path / "file" / "out")], "cannot be made"),
    ):
        assert main(["compare-methods", *words]) == 2
        assert said in capsys.readouterr().err


def test_command_prints_the_table_and_what_comes_next(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = GOOD + "learning_rates: [1e-2]\nmethods: {probe: {task: LinearHeadTask, method: LinearProbe}}\n"
    Path("c.yaml").write_text(text)
    assert main(["compare-methods", "--config", "c.yaml", "--seeds", "1", "1", "--output", "out"]) == 0
    out, err = capfd.readouterr()
    assert out.count("probe, seed 1") == 1 and "nan" not in out
    assert "Figures: out/ (cells.json, comparison.yaml, table.md)" in out
    assert not any(word in out + err for word in ("Tip", "GPU", "TPU", "eval mode"))
    assert main(["compare-methods", "--config", "c.yaml", "--tune", "--output", "rates"]) == 0
    assert "  probe: {task: LinearHeadTask, method: LinearProbe, head_learning_rate: 0.01}" in capfd.readouterr().out
    assert json.loads(Path("rates/tuning.json").read_text())["methods"].keys() == {"probe"}
