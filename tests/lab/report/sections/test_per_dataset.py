"""Reports of language sweeps: the tests of a run side by side, the paper's Tables 3, 4, 6, 10 and 15 beside them."""

import csv
import io
from pathlib import Path
from statistics import fmean

import pytest

from randlora_pl.lab.paper import notes
from randlora_pl.lab.report import markdown
from randlora_pl.lab.report.accuracy import Beside, accuracy_table, average_table
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import build, cells_csv, summary_csv
from randlora_pl.lab.report.training import cost_table
from tests.lab.report.language import ACCURACY, figures, write_language_sweep
from tests.lab.report.sweeps import write_cell
from tests.lab.report.test_tables import cell_of

TITLES = ["BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RandLoRA at 170k with both seeds, LoRA at 15k with one that failed and one that was never run."""
    return write_language_sweep(
        tmp_path_factory.mktemp("sweep"),
        {
            ("170k", "RandLoRA-10", 1): figures("RandLoRA-10"),
            ("170k", "RandLoRA-10", 2): figures("RandLoRA-10", 0.02),
            ("170k", "LoRA-16", 1): figures("LoRA-16", -0.01, 5_898_240),
            ("15k", "LoRA-16", 1): "CUDA out of memory",
            ("zero-shot", "zero-shot", 1): figures("zero-shot", -0.4) | {"test/acc/hellaswag": 0.0},
        },
    )


def test_the_layout_of_table_15(folder: Path) -> None:
    sweep = read_sweep(folder)
    sweep, beside = sweep.by_test(), Beside(sweep.plan)
    table = accuracy_table(sweep, beside, "Qwen2")
    titles = [cell.text for cell in table.header]
    assert titles == ["Method", "Data", "Trained parameters", *TITLES, "Average"]
    assert [row[1].text for row in table.rows] == ["zero-shot", "15k", "15k", "170k", "170k"]
    cell = cell_of(table, "BoolQ", "RandLoRA-10", "170k")
    assert cell.sort == pytest.approx(62.0) and cell.below == "paper 61.47 (+0.5)"
    average = cell_of(table, "Average", "RandLoRA-10", "170k")
    mean = 100 * fmean(ACCURACY.values()) + 1
    assert average.sort == pytest.approx(mean), "the unweighted mean over the tests, as test/acc"
    assert average.below == f"paper 57.7 ({mean - 57.7325:+.1f})"
    assert "paper 46.46" in cell_of(table, "HellaSwag", "LoRA-16", "170k").below
    for title in TITLES:
        failed, never = (cell_of(table, title, method, "15k") for method in ("LoRA-16", "RandLoRA-10"))
        assert failed.missing and failed.text.startswith("failed: CUDA") and failed.below.startswith("paper ")
        assert never.missing and never.text == "not run" and never.below.startswith("paper ")
    zero = cell_of(table, "HellaSwag", "zero-shot", "zero-shot")
    assert zero.text == "0.0" and zero.below == "paper 2.5 (-2.5)", "no answer at all is a result"


def test_costs_count_each_run_once_and_stand_beside_the_printed_share(folder: Path) -> None:
    sweep = read_sweep(folder)
    table = cost_table(sweep, Beside(sweep.plan), "Qwen2")
    assert table is not None
    assert cell_of(table, "Runs", "RandLoRA-10").text == "2" and "Texts per second" in [c.text for c in table.header]
    share = cell_of(table, "% of all", "RandLoRA-10")
    assert share.text == "1.2" and share.below == "paper 1.18 %"
    assert cell_of(table, "Training time, %", "RandLoRA-10").text == "100", "of LoRA, for want of full fine-tuning"


def test_the_whole_report_and_its_spreadsheets(folder: Path) -> None:
    sweep = read_sweep(folder)
    text = markdown(build(sweep), "figures")
    assert "4 of 9 runs finished" in text.replace("**", "") and "Table 15 of Albert" in text
    for note in notes():
        if "15" in note.tables and note.key in ("epochs", "ranks_of_table_9", "first_match"):
            assert " ".join(note.text.split())[:60] in text, note.key
    rows = list(csv.DictReader(io.StringIO(cells_csv(sweep))))
    assert len(rows) == 9 and {row["dataset"] for row in rows} == {"commonsense"}
    done = next(row for row in rows if row["method"] == "RandLoRA-10" and row["seed"] == "1" and row["accuracy"])
    assert float(done["test/acc/boolq"]) == pytest.approx(61) and float(done["samples_per_second"]) == 40
    means = list(csv.DictReader(io.StringIO(summary_csv(sweep))))
    one = next(r for r in means if (r["dataset"], r["budget"], r["method"]) == ("OBQA", "170k", "RandLoRA-10"))
    assert float(one["mean"]) == pytest.approx(61) and float(one["paper"]) == 59.6


def test_table_6_tells_the_size_of_the_adapter_with_the_data(tmp_path: Path) -> None:
    methods = {
        "DoRA-16": {"adapter": "DoRA", "paper_name": "DoRA efficient"},
        "DoRA-32": {"adapter": "DoRA", "paper_name": "DoRA performant"},
        "RandLoRA-30": {"adapter": "RandLoRA", "paper_name": "RandLoRA performant"},
    }
    cells = {("170k", method, 1): figures(method) for method in methods}
    models = {"LLama3": {"config": "commonsense_llama3"}}
    changes = {"methods": methods, "models": models, "seeds": [1], "paper": {"tables": [15, 6]}}
    sweep = read_sweep(write_language_sweep(tmp_path, cells, **changes))
    sweep, beside = sweep.by_test(), Beside(sweep.plan)
    table = average_table(sweep, beside, "LLama3")
    printed = {method: cell_of(table, "170k", method).below.partition(" (")[0] for method in methods}
    assert printed == {"DoRA-16": "paper 84.3", "DoRA-32": "paper 85.2", "RandLoRA-30": "paper 85.6"}
    assert {cell_of(table, "15k", method).text for method in methods} == {"not run"}
    cells_table = accuracy_table(sweep, beside, "LLama3")
    assert "paper 76.33" in cell_of(cells_table, "BoolQ", "RandLoRA-30", "170k").below, "by its own label in Table 15"
    assert cell_of(cells_table, "BoolQ", "DoRA-32", "170k").below == ""


def test_table_10_is_relative_to_lora(tmp_path: Path) -> None:
    methods = {"LoRA-32": {}, "DoRA-32": {}, "RandLoRA-30": {"paper_name": "RandLoRA"}}
    cells = {("15k", m, 1): figures(m) | {"fit_seconds": s} for m, s in zip(methods, (50.0, 110.0, 80.0), strict=True)}
    models = {"LLama3-8B": {"config": "commonsense_llama3"}}
    changes = {"methods": methods, "models": models, "seeds": [1], "budgets": ["15k"], "paper": {"table": 10}}
    sweep = read_sweep(write_language_sweep(tmp_path, cells, **changes))
    table = cost_table(sweep, Beside(sweep.plan), "LLama3-8B")
    assert table is not None
    found = {method: cell_of(table, "Training time, %", method) for method in methods}
    assert {m: c.text for m, c in found.items()} == {"LoRA-32": "100", "DoRA-32": "220", "RandLoRA-30": "160"}
    assert found["DoRA-32"].below == "paper 220 (+0)" and found["RandLoRA-30"].below == "paper 167 (-7)"


def test_table_4_has_its_deviations_and_scores_that_are_correlations(tmp_path: Path) -> None:
    models, methods = {"RoBERTa-base": {"config": "glue_roberta_base"}}, {"RandLoRA-64": {"adapter": "RandLoRA"}}
    changes = {"models": models, "methods": methods, "budgets": ["100%"], "seeds": [1], "paper": {"table": 4}}
    labels = {"model": "RoBERTa-base", "budget": "100%", "method": "RandLoRA-64", "seed": 1}
    base = {"finished": True, "method": "RandLoRA", "trainable_parameters": 700_000}
    write_language_sweep(tmp_path, {}, **changes | {"datasets": ["cola"]})
    cell = {"test/acc": 0.9, "test/matthews": -0.05, "test/score": -0.05, "data/metric": "matthews"}
    write_cell(tmp_path, labels | {"dataset": "cola"}, base | cell)
    cell = {"test/pearson": 0.9, "test/score": 0.9, "data/metric": "pearson"}
    write_cell(tmp_path, labels | {"dataset": "stsb"}, base | cell)
    sweep = read_sweep(tmp_path)
    beside = Beside(sweep.plan)
    table = accuracy_table(sweep.by_test(), beside, "RoBERTa-base")
    assert cell_of(table, "cola", "RandLoRA-64").text == "-5.0"
    assert cell_of(table, "cola", "RandLoRA-64").below == "paper 59.4 ± 2.1 (-64.4)"
    assert cell_of(table, "stsb", "RandLoRA-64").below == "paper 90.3 ± 0.2 (-0.3)"
    beside.annotate(table)
    assert any("combined" in text for _, text, _ in beside.footnotes)
    assert beside.parameters("RoBERTa-base", "RandLoRA-64") == "0.7M"
    again = tmp_path / "again"  # without the cells
    again.mkdir()
    (again / "cells.csv").write_text(cells_csv(sweep))
    (again / "sweep.yaml").write_text((tmp_path / "sweep.yaml").read_text())
    for shown in (table, accuracy_table(read_sweep(again), beside, "RoBERTa-base")):
        below = {cell.text: cell.below for cell in shown.header if cell.below}
        assert below == {"cola": "Matthews × 100", "stsb": "Pearson × 100"}
        assert "test accuracy or correlation in percent" in shown.caption
