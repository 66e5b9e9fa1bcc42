"""What the tables say: accuracies, costs, comparisons."""

import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from randlora_pl.lab.report import Estimate, Table, TableCell, formatted, many, percent, shown
from randlora_pl.lab.report.accuracy import Beside, accuracy_table, average_table
from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.training import ALLOCATED, RESIDENT, cost_table, partial_table
from tests.lab.report.sweeps import METHODS, description, figures_of, write_cell, write_sweep

B32, L14 = "CLIP-ViT-B/32", "CLIP-ViT-L/14"


@pytest.fixture(scope="module")
def beside(sweep: Sweep) -> Beside:
    return Beside(sweep.plan)


def cell_of(table: Table, column: str, *row: str) -> TableCell:
    titles = [cell.text for cell in table.header]
    (found,) = [line for line in table.rows if tuple(cell.text for cell in line[: len(row)]) == row]
    return found[titles.index(column)]


def test_cells_with_interval_paper_and_seeds(sweep: Sweep, beside: Beside) -> None:
    table = accuracy_table(sweep, beside, B32)
    assert len(table.rows) == 1 + 4 * 6 and table.groups == [0, 1, 7, 13, 19]
    assert {len(row) for row in table.rows} == {len(table.header)} == {3 + 5 + 1}
    cell = cell_of(table, "cars", "LoRA-32", "1-shot")
    values = sweep.by_seed(Key(B32, "cars", "1-shot", "LoRA-32"))
    mean, half = fmean(values.values()), 4.3027 * stdev(values.values()) / 3**0.5
    assert cell.text == f"{mean:.1f} ± {half:.1f}" and cell.sort == pytest.approx(mean)
    assert cell.below == f"paper 51.9 ({mean - 51.9:+.1f})"
    assert all(f"seed {seed}: {value:.2f}" in cell.title for seed, value in values.items())


def test_cells_without_a_run_say_so(sweep: Sweep, beside: Beside) -> None:
    table = accuracy_table(sweep, beside, L14)
    failed = cell_of(table, "eurosat", "full fine-tuning", "1-shot")
    assert failed.missing and failed.text.startswith("failed: CUDA out of memory") and failed.text.endswith("…")
    assert "use --data.batch_size 32" in failed.title and failed.below == "paper 81.2"
    missing = cell_of(table, "oxfordpets", "NoLA", "16-shot")
    assert missing.missing and missing.text == "not run" and missing.sort is None
    partly = cell_of(table, "dtd", "RandLoRA-6", "4-shot")
    assert partly.below.startswith("2 of 3 seeds · paper ") and "seed 2: failed: the loss is not finite" in partly.title
    assert "16-shot: the averages leave out oxfordpets (no finished run of NoLA)." in table.below


def test_averages(sweep: Sweep, beside: Beside) -> None:
    table = average_table(sweep, beside, B32)
    assert [cell.text for cell in table.header][2:] == ["zero-shot", "1-shot", "4-shot", "16-shot", "100%"]
    assert [cell.below for cell in table.header][2:] == [*["5 datasets"] * 3, "4 datasets", "5 datasets"]
    cell = cell_of(table, "16-shot", "LoRA-32")
    shared = ("cars", "dtd", "eurosat", "flowers102")
    average = sweep.average(B32, "16-shot", "LoRA-32", shared)
    assert average is not None and cell.text.startswith(f"{average.estimate.mean:.1f} ± ")
    printed = beside.average(B32, "16-shot", "LoRA-32", shared)
    assert printed is not None and f"paper {printed.value:.1f} (" in cell.below
    assert cell_of(table, "1-shot", "zero-shot").text == cell_of(table, "zero-shot", "LoRA-32").text == ""
    beside.annotate(table)
    assert beside.footnotes and table.notes and cell_of(table, "Method", "RandLoRA-6").notes
    both = (*accuracy_table(sweep, beside, B32).rows, *table.rows)
    assert not any(cell.best for row in both for cell in row), "three seeds give no verdict, and a mean alone is none"


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    sweep = read_sweep(write_sweep(tmp_path, description(models={B32: {}}, budgets=[1], seeds=[7])))
    beside = Beside(sweep.plan)
    cell = cell_of(accuracy_table(sweep, beside, B32), "cars", "LoRA-32", "1-shot")
    assert re.fullmatch(r"\d+\.\d", cell.text) and cell.title.endswith("one seed: no interval")
    average = cell_of(average_table(sweep, beside, B32), "1-shot", "LoRA-32")
    assert "±" not in average.text and "no interval" in average.title
    assert partial_table(sweep) is None, "no run has a rank"


def test_averages_say_why_there_is_none(tmp_path: Path) -> None:
    apart = {"LoRA-32": "cars", "RandLoRA-6": "dtd"}
    fails = {"VeRA-256": "out of memory"}
    keep = lambda cell: cell["method"] in fails or apart.get(cell["method"]) == cell["dataset"]  # noqa: E731
    content = description(datasets=["cars", "dtd"])
    sweep = read_sweep(write_sweep(tmp_path, content, keep, lambda cell: fails.get(cell["method"])))
    table = average_table(sweep, Beside(sweep.plan), B32)
    found = {method: cell_of(table, "1-shot", method) for method in ("LoRA-32", "RandLoRA-6", "VeRA-256", "NoLA")}
    assert all(cell.missing and cell.sort is None for cell in found.values())
    assert found["LoRA-32"].text == found["RandLoRA-6"].text == "no dataset in common"
    assert found["VeRA-256"].text == "failed: out of memory" and found["NoLA"].text == "not run"


def test_costs_are_relative_to_full_fine_tuning(sweep: Sweep, beside: Beside) -> None:
    table = cost_table(sweep, beside, B32)
    assert table is not None
    assert cell_of(table, "Training time, %", "full fine-tuning").text == "100"
    lora, rand = cell_of(table, "Training time, %", "LoRA-32"), cell_of(table, "Training time, %", "RandLoRA-6")
    assert (lora.text, lora.below) == ("90", "paper 90 (+0)") and (rand.text, rand.below) == ("110", "paper 113 (-3)")
    assert cell_of(table, "Memory, %", "LoRA-32").text == f"{100 * 7.3 / 9:.0f}"
    assert cell_of(table, "Peak memory, GB", "LoRA-32").text == "7.30"
    assert ALLOCATED in table.below and RESIDENT not in table.below
    assert "Percents are relative to full fine-tuning with the same dataset, budget and seed." in table.below


def test_costs_compare_the_same_cells_only(tmp_path: Path) -> None:
    """Full fine-tuning has the quick budget only: the slow one must not count."""
    labels = {"model": B32, "dataset": "cars", "method": "LoRA-32", "seed": 1}
    for budget, seconds in (("1-shot", 10.0), ("100%", 1000.0)):
        write_cell(tmp_path, labels | {"budget": budget}, figures_of(labels, 0.5) | {"fit_seconds": seconds})
    other = labels | {"budget": "1-shot", "method": "full fine-tuning"}
    write_cell(tmp_path, other, figures_of(other, 0.5) | {"fit_seconds": 20.0})
    sweep = read_sweep(tmp_path)
    table = cost_table(sweep, Beside(sweep.plan), B32)
    assert table is not None and cell_of(table, "Training time, %", "LoRA-32").text == "50"


@pytest.mark.parametrize(
    ("device", "machine", "percent"), [("cpu", "other", "no reference"), ("cpu", "one", "50"), ("cuda", "other", "50")]
)
def test_costs_on_cpus_compare_one_machine_only(tmp_path: Path, device: str, machine: str, percent: str) -> None:
    for method, seconds, place in (("LoRA-32", 10.0, "one"), ("full fine-tuning", 20.0, machine)):
        labels = {"model": B32, "dataset": "cars", "budget": "1-shot", "method": method, "seed": 1}
        figures = figures_of(labels, 0.5, device) | {"fit_seconds": seconds, "machine": place}
        write_cell(tmp_path, labels, figures)
    sweep = read_sweep(tmp_path)
    table = cost_table(sweep, Beside(sweep.plan), B32)
    assert table is not None and cell_of(table, "Training time, %", "LoRA-32").text == percent


def test_costs_of_several_devices_and_without_full_fine_tuning(tmp_path: Path) -> None:
    labels = {"model": B32, "dataset": "cars", "budget": "1-shot", "seed": 1}
    for method in ("LoRA-32", "RandLoRA-6"):
        for seed, device in ((1, "cpu"), (2, "cuda")):
            place = labels | {"method": method, "seed": seed}
            write_cell(tmp_path, place, figures_of(place, 0.5, device))
    unmeasured = {"test/acc": 0.5, "finished": True, "fit_seconds": 3.0, "peak_memory_bytes": 0, "device": "cpu"}
    write_cell(tmp_path, labels | {"method": "NoLA"}, unmeasured)
    sweep = read_sweep(tmp_path)
    table = cost_table(sweep, Beside(sweep.plan), B32)
    assert table is not None and len(table.rows) == 5
    assert cell_of(table, "Peak memory, GB", "NoLA").text == "not measured"
    assert {row[1].text for row in table.rows} == {"cpu", "cuda"}
    assert "On cpu, percents are relative to LoRA-32 with the same dataset, budget and seed." in table.below
    assert RESIDENT in table.below and ALLOCATED in table.below


def test_rank_against_accuracy(sweep: Sweep) -> None:
    table = partial_table(sweep)
    assert table is not None
    rows = [[cell.text for cell in cells] for cells in table.rows]
    assert [(cells[:2], cells[4:]) for cells in rows] == [(["effective rank", m], ["4 to 5", "5"]) for m in (B32, L14)]
    assert all(-1 <= (cell.sort or 0) <= 1 and "±" in cell.text for cells in table.rows for cell in cells[2:4])
    assert len(table.below) == 1, "no controls were run"
    methods, models = sweep.plan.methods | {"RandLoRA-6": {"variant": "a"}}, {B32: sweep.plan.models[B32]}
    plan = replace(sweep.plan, methods=methods, models=models, budgets=sweep.plan.budgets[:2])
    table = partial_table(replace(sweep, plan=plan))
    assert table is not None and table.below[1:] == []  # without the rank itself
    table = partial_table(replace(sweep, plan=plan, cells=sweep.cells.assign(**{"spectrum/rank": 6.0})))
    assert table is not None and table.below[1].startswith(
        "1 control with as many trained numbers as RandLoRA: RandLoRA-6 (its sums come first"
    )


def test_correlations_at_equal_parameters_are_those_of_residuals(tmp_path: Path) -> None:
    """Of ranks and of accuracies on each dataset, less what a line in the logarithm of the parameters explains."""
    ranks, sizes = [10.0, 40.0, 30.0, 200.0, 90.0], [1_000, 2_000, 9_000, 20_000, 90_000]
    accuracies = {"cars": [0.5, 0.7, 0.6, 0.65, 0.9], "dtd": [0.4, 0.3, 0.6, 0.5, 0.7]}
    names = list(METHODS)[:5]

    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        if labels["method"] not in names:
            return {}
        place = names.index(labels["method"])
        own = {"test/acc": accuracies[labels["dataset"]][place], "trainable_parameters": sizes[place]}
        return own | {"spectrum/effective_rank": ranks[place]}

    content = description(models={B32: {}}, datasets=list(accuracies), budgets=[1], seeds=[1])
    content["methods"] = {name: METHODS[name] for name in names}
    table = partial_table(read_sweep(write_sweep(tmp_path, content, more=figures)))
    assert table is not None and len(table.rows) == 1

    def ordered(values: list[float]) -> np.ndarray:
        return np.argsort(np.argsort(values)).astype(float)

    def rest(values: list[float]) -> np.ndarray:
        line = np.stack([np.ones(5), np.log(sizes)], axis=1)
        return ordered(values) - line @ np.linalg.lstsq(line, ordered(values), rcond=None)[0]

    for cell, part in zip(table.rows[0][2:4], (rest, ordered), strict=True):
        each = [float(np.corrcoef(part(ranks), part(values))[0, 1]) for values in accuracies.values()]
        assert cell.sort == pytest.approx(fmean(each), abs=1e-9) and 0.01 < abs(fmean(each)) < 0.99
        assert cell.title == "; ".join(f"{name} {value:+.2f}" for name, value in zip(accuracies, each, strict=True))


def test_words() -> None:
    assert (percent(57.0), percent(85.98), percent(51.9)) == ("57.0", "85.98", "51.9")
    assert (formatted(-0.04), formatted(1.25), formatted(-2.0)) == ("+0.0", "+1.2", "-2.0")
    assert (formatted(-0.004, "+.2f"), formatted(-0.06, "+.0f"), formatted(-1.5e-9, ".3f")) == ("+0.00", "+0", "0.000")
    assert shown(Estimate((-0.003, 0.001)), "+.2f") == "+0.00 ± 0.03" and shown(Estimate((84.26,))) == "84.3"
    assert (many(1, "run"), many(0, "run"), many(2, "run")) == ("1 run", "0 runs", "2 runs")
