"""Rates and how they were chosen, and the verdict of each pair of methods."""

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from randlora_pl.lab.report import Table, TableCell, markdown
from randlora_pl.lab.report.accuracy import Beside, accuracy_table
from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.comparisons import Versus, comparisons, conclusion, matrix_table, references, versus_table
from randlora_pl.lab.report.files import build, cells_csv, write_report
from randlora_pl.lab.report.training import heads_tied, rate_table, untuned
from randlora_pl.sweep.margins import next_higher
from randlora_pl.tasks.measures import ACCURACY, Measure
from randlora_pl.utils.text import pack_bits
from tests.lab.report.sweeps import METHODS, MODELS, description, write_sweep
from tests.support.products import in_one_item

B32 = "CLIP-ViT-B/32"
DATASETS = ["a", "b", "c", "d", "e", "f", "g"]
RATED = {name: METHODS[name] | {"learning_rate": 0.01} for name in ("LoRA-32", "RandLoRA-6")}


def provenance(methods: dict[str, Any] = RATED, **changes: Any) -> dict[str, Any]:
    """What `tune` writes of methods that have their chosen rate."""
    entries = {n: {"method": facts, "chosen": {"learning_rate": 0.01}, "tried": []} for n, facts in methods.items()}
    search = {"finished": True, "split": "val", "monitor": "val/acc", "seeds": [0], "budgets": ["1-shot"]}
    return search | {"models": {B32: MODELS[B32]}, "datasets": ["a"], "methods": entries} | changes


def swept(
    folder: Path,
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda labels: {},
    fail: Callable[[dict[str, Any]], str | None] = lambda labels: None,
    **changes: Any,
) -> Sweep:
    content = {"paper": None, "models": {B32: MODELS[B32]}, "datasets": DATASETS, "budgets": [1]}
    content |= {"seeds": [1, 2, 3, 4, 5], "methods": RATED, "tuned": provenance()} | changes
    return read_sweep(write_sweep(folder, description(**content), fail=fail, more=more))


def pair_of(sweep: Sweep) -> Versus:
    (found,) = comparisons(sweep)
    return found


def better_by(points: dict[str, float]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Accuracies in which RandLoRA is so much better on a dataset, whatever the seed."""

    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        gain = points.get(labels["dataset"], 0.0) if labels["method"] == "RandLoRA-6" else 0.0
        return {"test/acc": 0.5 + labels["seed"] / 1000 + gain / 100}

    return figures


def test_a_method_that_is_better_on_every_data_set_has_a_verdict(tmp_path: Path) -> None:
    gains = {name: 1.0 + n for n, name in enumerate(DATASETS)}
    found = pair_of(swept(tmp_path, better_by(gains)))
    assert (found.first, found.second) == ("RandLoRA-6", "LoRA-32")
    assert found.by_dataset == pytest.approx(gains) and found.seeds == 5
    assert found.difference.mean == pytest.approx(fmean(gains.values()))
    assert found.p == pytest.approx(2 / 2**7) and found.verdict == "RandLoRA-6 is better"
    assert "RandLoRA-6 is better (p = 0.016)" in found.sentence()


OTHER_RATE = RATED | {"LoRA-32": METHODS["LoRA-32"] | {"learning_rate": 0.02}}
OTHER_RANK = RATED | {"LoRA-32": RATED["LoRA-32"] | {"rank": 16}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [1, 2, 3]}, "no verdict: 3 seeds, 5 are needed"),
        ({"datasets": DATASETS[:5]}, "no verdict: 5 datasets, 6 are needed"),
        ({"tuned": None}, "not tuned: RandLoRA-6 typed, LoRA-32 typed"),
        ({"tuned": provenance({"LoRA-32": RATED["LoRA-32"]})}, "not tuned: RandLoRA-6 typed, LoRA-32 validation"),
        ({"tuned": provenance(finished=False)}, "not tuned: RandLoRA-6 typed, LoRA-32 typed"),
        ({"tuned": provenance(models={"x": {"config": "x"}})}, "not tuned: RandLoRA-6 typed, LoRA-32 typed"),
        ({"methods": OTHER_RATE}, "not tuned: RandLoRA-6 validation, LoRA-32 typed"),
        ({"methods": OTHER_RANK}, "not tuned: RandLoRA-6 validation, LoRA-32 typed"),
        ({"methods": {name: METHODS[name] for name in RATED}}, "not tuned: RandLoRA-6 default, LoRA-32 default"),
    ],
)
def test_why_there_is_no_verdict(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    sweep = swept(tmp_path, better_by(dict.fromkeys(DATASETS, 25.0)), **changes)
    found = pair_of(sweep)
    assert found.p is None and found.verdict == said
    compared = references(sweep, [found])
    assert conclusion(sweep, [found], compared)[0] == "This sweep cannot show which method is more accurate."
    assert not any(cell.best for row in matrix_table(sweep, compared[0]).rows for cell in row)


def test_runs_of_one_seed_are_a_pair(tmp_path: Path) -> None:
    """Accuracies rise with the seed, and each method lacks another one."""
    lacks, gains = {"RandLoRA-6": 5, "LoRA-32": 1}, dict.fromkeys(DATASETS, 2.0)
    fails = lambda labels: "out of memory" if lacks.get(labels["method"]) == labels["seed"] else None  # noqa: E731
    found = pair_of(swept(tmp_path, better_by(gains), fails))
    assert found.seeds == 3 and found.by_dataset == pytest.approx(gains)


def of_samples(gained: int, lost: int = 0, samples: int = 500) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Test samples of which RandLoRA gets so many more right than LoRA, and so many others wrong."""

    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        right = np.arange(samples) % 2 == 0
        if labels["method"] == "RandLoRA-6":
            right[1 : 2 * gained : 2], right[: 2 * lost : 2] = True, False
            right[1 - 2 * labels["seed"]], right[-2 * labels["seed"]] = True, False  # seeds differ a little
        return {"test/acc": float(right.mean()), "test/right": pack_bits(right.tolist())}

    return figures


def four_pictures(labels: dict[str, Any]) -> dict[str, Any]:
    """Four of 200 test samples that RandLoRA alone gets right, in every seed: McNemar's exact test has p = 0.125."""
    right = np.arange(200) % 2 == 0
    right[1:8:2] = labels["method"] == "RandLoRA-6"
    return {"test/acc": float(right.mean()), "test/right": pack_bits(right.tolist())}


def changed(seeds: set[int], **facts: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Results of LoRA that differ from those of `of_samples` in some seeds."""
    usual = of_samples(50)
    return lambda labels: usual(labels) | (facts if labels["seed"] in seeds and labels["method"] == "LoRA-32" else {})


WITH_RECORDS = "with records of the same test samples (test/right in results.json), 5 are needed."
WON = "+10.0 ± 2.7 points over 500 test samples of a and 5 seeds; RandLoRA-6 is better"
REACH = " for new samples of a, which says nothing about other datasets"


@pytest.mark.parametrize(
    ("more", "changes", "said"),
    [
        (of_samples(50), {}, f"{WON}{REACH} (p = "),
        (of_samples(0, 50), {}, f"LoRA-32 is better{REACH} (p = "),
        (of_samples(20, 20), {}, f"no difference found{REACH} (p = 1)"),
        (of_samples(50), {"seeds": [1, 2]}, "no verdict: 2 seeds, 5 are needed."),
        (of_samples(9, 0, 50), {}, "no verdict: 50 test samples, 100 are needed."),
        (of_samples(9, 0, 50), {"seeds": [1, 2]}, "2 seeds, 5 are needed; 50 test samples, 100 are needed."),
        (of_samples(50), {"tuned": None, "seeds": [1, 2]}, "not tuned: RandLoRA-6 typed, LoRA-32 typed; no verdict: 2"),
        (four_pictures, {}, "no verdict: 4 test samples on which the methods differ, 10 are needed."),
        (
            changed({2, 3, 4}, **{"test/right": None}),
            {},
            f"a and 2 seeds; no verdict: 2 seeds {WITH_RECORDS}",
        ),
        (changed({5}, **{"test/right": pack_bits([True] * 499)}), {}, f"no verdict: 4 seeds {WITH_RECORDS}"),
        (changed({1, 2, 3, 4, 5}, **{"data/metric": "matthews"}), {}, "a Matthews correlation is not a mean over test"),
        (better_by({"a": 9.0}), {}, "no record of the same test samples in two common seeds (test/right in results.js"),
    ],
)
def test_verdict_on_a_single_dataset(tmp_path: Path, more: Any, changes: dict[str, Any], said: str) -> None:
    sweep = swept(tmp_path / "sweep", more, datasets=["a"], **changes)
    assert said in pair_of(sweep).sentence()
    (tmp_path / "again").mkdir()
    (tmp_path / "again/cells.csv").write_text(cells_csv(sweep))  # a report is made again from this alone
    shutil.copy(tmp_path / "sweep/sweep.yaml", tmp_path / "again")
    assert pair_of(read_sweep(tmp_path / "again")).sentence() == pair_of(sweep).sentence()


def test_report_on_a_single_dataset_says_what_it_holds_for(tmp_path: Path) -> None:
    text = markdown(build(swept(tmp_path, of_samples(50), datasets=["a"])))
    assert f"RandLoRA-6 is better than LoRA-32{REACH}." in text and "over test samples and seeds together" in text
    assert "interval of the mean is over test samples and seeds" in text and "sign-flip" not in text


@pytest.mark.parametrize("changes", [{"seeds": [1, 2, 3]}, {"tuned": None}])
def test_no_report_calls_an_untuned_rate_better(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = markdown(build(swept(tmp_path, better_by({"a": 25.0}), datasets=["a"], **changes)))
    short = text.partition("## Difference to a reference")[0]
    assert "better" not in short and ("+25.0" in short) == ("seeds" in changes)
    untuned = "the learning rates are not tuned (randlora-pl sweep CONFIG --tune searches them)"
    why = "3 seeds, 5 are needed" if "seeds" in changes else untuned
    assert f"No verdict for 1 of 1 pair of methods: {why}; no record of the same test samples" in short
    assert "| **" not in text, "bold is for verdicts"


@pytest.mark.usefixtures("undrawn")
def test_pairs_are_adjusted_together(tmp_path: Path) -> None:
    methods = RATED | {"VeRA-256": METHODS["VeRA-256"] | {"learning_rate": 0.01}}
    sweep = swept(tmp_path, better_by(dict.fromkeys(DATASETS, 2.0)), methods=methods, tuned=provenance(methods))
    found = {(one.first, one.second): one.p for one in comparisons(sweep)}
    assert sorted(found.values()) == pytest.approx([3 * 2 / 2**7, 3 * 2 / 2**7, 1])
    more, facts = better_by(dict.fromkeys(DATASETS, 2.0)), {"methods": methods, "tuned": provenance(methods)}
    write_report(swept(tmp_path / "planned", more, pairs=[["LoRA-32", "RandLoRA-6"]], **facts), tmp_path / "report")
    for folder in (tmp_path / "planned", tmp_path / "report"):
        sweep = read_sweep(folder)
        first, *others = comparisons(sweep)
        assert first.p == pytest.approx(2 / 2**7) and first.verdict == "RandLoRA-6 is better"
        assert [(one.p, one.verdict) for one in others] == [(None, "not planned")] * 2
        assert all(one.difference.half is not None for one in others)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "found in 1 of the 1 pair of methods that could be tested, of 1 planned" in text
    assert "No verdict" not in text and "not planned" in text and "pairs in sweep.yaml" in text


def test_rates_of_the_papers_tables_are_one_rule(tmp_path: Path) -> None:
    methods = {name: METHODS[name] for name in ("LoRA-32", "RandLoRA-6")} | {"full": {"learning_rate": 3e-5}}

    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        rate = {"LoRA-32": 1e-3, "RandLoRA-6": 1e-3}.get(labels["method"], 3e-5)
        kind = {"full": {"method": "FullFineTuning", "trainable_parameters": 10}}.get(labels["method"], {})
        return {"learning_rate": rate} | kind

    sweep = swept(tmp_path, figures, methods=methods, paper={"table": 11}, tuned=None)
    assert not untuned(sweep, B32, ["LoRA-32", "RandLoRA-6"])
    assert untuned(sweep, B32, ["LoRA-32", "full"]) == "LoRA-32 paper, full typed"
    table = rate_table(sweep)
    assert table is not None
    rows = [[cell.text for cell in row] for row in table.rows]
    assert ["RandLoRA-6", B32, "paper", "everywhere", "0.001"] in rows
    assert ["full", B32, "typed", "everywhere", "3e-05"] in rows


def searched(**changes: Any) -> dict[str, Any]:
    """Methods with two rates and one, and what `tune` writes of them by the rule ``lowest``."""
    rates = {"LoRA-32": (0.01, 0.2), "RandLoRA-6": (0.01, 0.4)}
    methods: dict[str, Any] = {
        name: METHODS[name] | {"learning_rate": rate, "head_learning_rate": head}
        for name, (rate, head) in rates.items()
    }
    methods["probe"] = {"adapter": "LinearProbe", "head_learning_rate": 0.5}

    def entry(name: str, *tried: tuple[float | None, float, dict[str, float]]) -> dict[str, Any]:
        chosen = {key: rate for key, rate in methods[name].items() if key.endswith("learning_rate")}
        found = [dict(zip(chosen, filter(None, rates), strict=True)) | {"val/acc": by_seed}
                 for *rates, by_seed in tried]  # fmt: skip
        entries = [each if each["val/acc"] else each | {"failed": "the loss is nan"} for each in found]
        return {"method": methods[name], "chosen": chosen, "interior": True, "tried": entries}

    both, first, worse = {"0": 0.5, "6": 0.6}, {"0": 0.48}, {"0": 0.3}
    entries = {
        "LoRA-32": entry("LoRA-32", (0.01, 0.2, both), (0.02, 0.2, first), (0.04, 0.2, {}), (0.02, 0.4, {})),
        "RandLoRA-6": entry("RandLoRA-6", (0.005, 0.4, both), (0.01, 0.4, both), (0.02, 0.4, {}), (0.01, 0.8, worse)),
        "probe": entry("probe", (None, 0.5, both), (None, 1.0, {"0": 0.51, "6": 0.6})),
    }
    rule: dict[str, Any] = {"rule": "lowest", "trials": 16, "finalists": 4, "measure": vars(ACCURACY)}
    record = provenance(methods, seeds=[0, 6], **rule) | {"methods": entries}
    return {"methods": methods, "tuned": record | changes}


def both_rates(labels: dict[str, Any]) -> dict[str, Any]:
    rate = {"LoRA-32": 0.2, "RandLoRA-6": 0.4, "probe": 0.5}.get(labels["method"])
    kind = {"method": "LinearProbe"} if labels["method"] == "probe" else {}
    return kind | ({"learning_rate": 0.01, "head_learning_rate": rate} if rate else {})


def test_both_rates_are_shown_with_the_distance_to_what_fails(tmp_path: Path) -> None:
    sweep = swept(tmp_path / "sweep", both_rates, datasets=["a", "b"], **searched())
    table = rate_table(sweep)
    assert table is not None
    assert [cell.text for cell in table.header][4:] == [
        *("Adapter rate", "Head rate", "Next higher adapter rate", "Next higher head rate"),
    ]
    rows = {row[0].text: [(cell.text, cell.below) for cell in row[4:]] for row in table.rows}
    assert rows == {
        "LoRA-32": [("0.01", ""), ("0.2", ""), ("0.02: -2.0", "breaks at 0.04"), ("not tried", "none tried breaks")],
        "RandLoRA-6": [("0.01", ""), ("0.4", ""), ("0.02: failed", "breaks at 0.02"), ("0.8: -20.0", "breaks at 0.8")],
        "probe": [("", ""), ("0.5", ""), ("", ""), ("1: +0.5", "none tried breaks")],
    }
    assert {row[2].text for row in table.rows} == {"validation"}
    text = " ".join(table.below)
    assert "Every method had 16 trials, or all rates of a shorter list, from its own rates with seed 0" in text
    assert "within one standard error of the best, the lowest rates." in text
    shutil.copytree(tmp_path / "sweep", tmp_path / "report", ignore=shutil.ignore_patterns("cells"))
    (tmp_path / "report" / "cells.csv").write_text(cells_csv(sweep))
    assert rate_table(read_sweep(tmp_path / "report")) == table, "as from cells.csv"
    other = lambda labels: both_rates(labels) | {"head_learning_rate": 0.3}  # noqa: E731
    sweep = swept(tmp_path / "other", other, datasets=["a", "b"], **searched())
    table = rate_table(sweep)
    assert table is not None
    how = {row[0].text: row[2].text for row in table.rows}
    assert how == {"LoRA-32": "typed", "RandLoRA-6": "typed", "probe": "validation"}, "the head ran at another rate"


BEST = {"LoRA-32": 0.016, "RandLoRA-6": 0.001}
"""Best rate of each adapter; the best rate of their equal heads is 0.016."""


def accuracy_at(method: str, rate: float, head: float) -> float:
    """RandLoRA is half a point better; an adapter or head loses a tenth of a point for each squared factor of two."""
    gain = 0.5 if method == "RandLoRA-6" else 0.0
    return 60 + gain - 0.1 * (np.log2(rate / BEST[method]) ** 2 + np.log2(head / 0.016) ** 2)


def swept_after_a_search(folder: Path, apart: bool, recorded: bool = True) -> Sweep:
    """Search the rates, with the heads' apart or tied to them, and run what is best on seven datasets."""
    grid = [0.001 * 2**power for power in range(6)]
    rates = {}
    for name in BEST:
        pairs = [(rate, head) for rate in grid for head in grid if apart or head == rate]
        rates[name] = max(pairs, key=lambda pair: accuracy_at(name, *pair))
    options = ("learning_rate", "head_learning_rate") if apart else ("learning_rate",)
    chosen = {name: dict(zip(options, both, strict=False)) for name, both in rates.items()}
    methods = {name: METHODS[name] | chosen[name] for name in BEST}
    entries = {name: {"method": methods[name], "chosen": chosen[name], "tried": []} for name in BEST}

    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        if (name := labels["method"]) not in BEST:
            return {}
        found = accuracy_at(name, *rates[name]) + 0.01 * labels["seed"]
        run = dict(zip(("learning_rate", "head_learning_rate"), rates[name], strict=True)) if recorded else {}
        return {"test/acc": found / 100, "learning_rate": rates[name][0], "task": "TextClassificationTask"} | run

    return swept(folder, figures, methods=methods, tuned=provenance(methods) | {"methods": entries})


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("recorded", [True, False])
def test_heads_tied_to_the_rate_of_their_adapter_flip_a_verdict(tmp_path: Path, recorded: bool) -> None:
    """Older runs have no record of the head's rate, and a report is made again from its cells alone."""
    write_report(swept_after_a_search(tmp_path / "tied", False, recorded), tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    page = (tmp_path / "report" / "index.html").read_text()
    lines, table = told(read_sweep(tmp_path / "report"))
    assert lines[0] == f"{B32}: LoRA-32 is better than RandLoRA-6 (heads tied)."
    assert lines[2].startswith("Heads tied in 1 of 1 pair of methods: a head learned at the rate of its adapter, from ")
    assert "from 0.004 (RandLoRA-6) to 0.016 (LoRA-32), which was not searched" in lines[2]
    assert lines[3].endswith("LoRA-32 is better (p = 0.016); heads tied.")
    assert row_of(table, "RandLoRA-6")["Verdict"].below == "p = 0.016, heads tied"
    assert (
        "| **LoRA-32 is better**<br>heads tied |" in text and "LoRA-32 is better than RandLoRA-6 (heads tied)" in page
    )
    apart = markdown(build(swept_after_a_search(tmp_path / "apart", True)))
    assert f"{B32}: RandLoRA-6 is better than LoRA-32." in apart and "tied" not in apart


@pytest.mark.parametrize(
    ("changed", "tied"),
    [
        ({}, True),
        ({"learning_rate": 0.004, "head_learning_rate": 0.004}, False),  # both heads learn at one rate
        ({"head_learning_rate": 0.3}, True),  # one head of two is enough
        ({"method": "LinearProbe", "learning_rate": 0.016, "head_learning_rate": 0.016}, True),  # RandLoRA's is tied
        ({"task": "LinearHeadTask", "head_learning_rate": None}, True),
    ],
)
def test_heads_of_a_pair_are_tied_by_the_rates_of_their_runs(
    tmp_path: Path, changed: dict[str, Any], tied: bool
) -> None:
    rates = {"learning_rate": 0.016, "head_learning_rate": 0.016}

    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        own = {"LoRA-32": rates | changed, "RandLoRA-6": dict.fromkeys(rates, 0.004)}.get(labels["method"], {})
        return {"task": "TextClassificationTask"} | own

    sweep = swept(tmp_path, figures, methods={name: METHODS[name] for name in BEST}, tuned=None)
    assert heads_tied(sweep, B32, ["RandLoRA-6", "LoRA-32"]) is tied
    runs = sweep.select(method="LoRA-32")["tied"]
    assert set(runs) == {not changed or changed.get("learning_rate") == 0.004}, "of one method alone"


@in_one_item(
    ("measure", "texts"),
    [
        (Measure("acc"), ("2: +20.0", "none tried breaks")),
        (Measure("mae", mode="min", decimals=3), ("2: +0.200", "breaks at 4")),
        (Measure("BLEU", decimals=2), ("2: +0.200", "none tried breaks")),
    ],
)
def test_a_rate_breaks_by_the_direction_of_the_metric(measure: Measure, texts: tuple[str, str]) -> None:
    tried = [{"learning_rate": rate, "val/m": {"0": figure}} for rate, figure in ((4.0, 0.9), (2.0, 0.6), (1.0, 0.4))]
    entry = {"chosen": {"learning_rate": 1.0}, "tried": tried}
    record = {"monitor": "val/m", "measure": vars(measure), "methods": {"LoRA": entry, "failed": {"chosen": None}}}
    assert next_higher(record, "LoRA", "learning_rate") == texts
    assert (
        next_higher(record, "LoRA", "head_learning_rate") == next_higher(record, "failed", "learning_rate") == ("", "")
    )


def test_a_best_rate_at_the_edge_of_its_search_gives_no_verdict(tmp_path: Path) -> None:
    facts = searched()
    gain = better_by(dict.fromkeys(DATASETS, 2.0))
    figures = lambda labels: gain(labels) | both_rates(labels)  # noqa: E731
    pairs = ("LoRA-32", "RandLoRA-6")
    assert not untuned(swept(tmp_path / "inside", figures, **facts), B32, pairs)
    facts["tuned"]["methods"]["LoRA-32"]["interior"] = False
    sweep = swept(tmp_path / "edge", figures, **facts)
    assert untuned(sweep, B32, pairs) == "LoRA-32 best at the edge of its search"
    found = {(one.first, one.second): one for one in comparisons(sweep)}
    assert found["RandLoRA-6", "LoRA-32"].p is None and "best at the edge" in found["RandLoRA-6", "LoRA-32"].sentence()
    assert any("a best rate lies at the edge of its search" in line for line in told(sweep)[0])


def test_several_rates_of_a_method_are_shown_with_their_places(tmp_path: Path) -> None:
    more = lambda labels: {"learning_rate": 0.01 if labels["dataset"] == "a" else 0.1}  # noqa: E731
    sweep = swept(tmp_path, more, methods={"LoRA-32": METHODS["LoRA-32"]}, tuned=None, datasets=["a", "b"])
    table = rate_table(sweep)
    assert table is not None
    rows = [[cell.text for cell in row][2:] for row in table.rows]
    assert rows == [["default", "a 1-shot", "0.01"], ["default", "b 1-shot", "0.1"]]


def test_a_cell_that_is_no_better_than_the_untrained_model_did_not_train(tmp_path: Path) -> None:
    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        accuracy = {"zero-shot": (0.222, 0), "LoRA-32": (0.22, 0.004), "RandLoRA-6": (0.5, 0.01)}
        start, slope = accuracy[labels["method"]]
        return {"test/acc": start + slope * labels["seed"]}

    sweep = swept(tmp_path, figures, datasets=["a"], seeds=[1, 2, 3], tuned=None)
    assert sweep.idle(Key(B32, "a", "1-shot", "LoRA-32")) and not sweep.idle(Key(B32, "a", "1-shot", "RandLoRA-6"))
    assert not sweep.idle(Key(B32, "a", "zero-shot", "zero-shot"))
    table = accuracy_table(sweep, Beside(sweep.plan), B32)
    assert [row[3].below for row in table.rows] == ["", "no change shown", ""]
    assert "1 of 2 trained cells: no change shown, according to their intervals: LoRA-32 (1)." in markdown(build(sweep))
    assert "was not measured" not in markdown(build(sweep))


def test_a_report_without_the_pretrained_model_does_not_explain_a_mark_that_no_cell_can_have(tmp_path: Path) -> None:
    methods = {name: METHODS[name] for name in ("LoRA-32", "RandLoRA-6")}
    content = description(models={B32: MODELS[B32]}, datasets=["a"], seeds=[1, 2], methods=methods)
    folder = write_sweep(tmp_path, content, zeroshot=False, more=lambda _: {"zeroshot/acc": None})
    text = markdown(build(read_sweep(folder)))
    assert "The accuracy of the pretrained model was not measured." in text and "no change shown" not in text


@pytest.mark.usefixtures("undrawn")
def test_a_report_is_made_again_from_its_cells(tmp_path: Path) -> None:
    methods = RATED | {"probe": {"config": "linear_probe", "head_learning_rate": 0.5}}

    def figures(labels: dict[str, Any]) -> dict[str, Any]:
        if labels["method"] != "probe":
            return {"learning_rate": 0.01, "spectrum/rank": [4.0, 8.0]}
        return {"method": "LinearProbe", "trainable_parameters": 1280, "head_learning_rate": 0.5, "learning_rate": 1e-3}

    sweep = swept(tmp_path / "sweep", figures, methods=methods, datasets=["a", "b"])
    write_report(sweep, tmp_path / "report")
    first = {path: path.read_bytes() for path in map((tmp_path / "report").joinpath, ("report.md", "cells.csv"))}
    write_report(read_sweep(tmp_path / "report"), tmp_path / "report", overwrite=True)
    assert {path: path.read_bytes() for path in first} == first, "but for the summary, which has more digits"


THREE = RATED | {"VeRA-256": METHODS["VeRA-256"] | {"learning_rate": 0.01}}


def told(sweep: Sweep) -> tuple[list[str], Table]:
    """The conclusion, and the matrix of the first model."""
    found = comparisons(sweep)
    compared = references(sweep, found)
    return conclusion(sweep, found, compared), matrix_table(sweep, compared[0])


def row_of(table: Table, method: str) -> dict[str, TableCell]:
    (cells,) = [row for row in table.rows if row[0].text == method]
    return {f"{title.text} {title.below}".strip(): cell for title, cell in zip(table.header, cells, strict=True)}


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (["LoRA-16", "LoRA-32", "RandLoRA-6", "full fine-tuning"], "LoRA-32"),  # the nearest to RandLoRA's size
        (["VeRA-256", "RandLoRA-6", "full fine-tuning"], "full fine-tuning"),
        (["VeRA-256", "NoLA"], "VeRA-256"),
    ],
)
def test_the_reference(tmp_path: Path, methods: list[str], reference: str) -> None:
    content = description(models={B32: {}}, datasets=["cars"], methods={name: METHODS[name] for name in methods})
    sweep = read_sweep(write_sweep(tmp_path, content))
    (found,) = references(sweep, comparisons(sweep))
    assert found.method == reference and list(found.pairs) == [name for name in methods if name != reference]
    assert all((one.first, one.second) == (name, reference) for name, one in found.pairs.items())


def test_a_verdict_is_told_and_marked_from_both_sides(tmp_path: Path) -> None:
    """RandLoRA is better than both; LoRA and VeRA do not differ, although VeRA's mean is higher by noise."""
    more = better_by(dict.fromkeys(DATASETS, 2.0))
    lines, table = told(swept(tmp_path, more, methods=THREE, tuned=provenance(THREE)))
    assert lines[0] == f"{B32}: RandLoRA-6 is better than LoRA-32, VeRA-256."
    assert lines[1] == "A difference was found in 2 of the 3 pairs of methods that could be tested (adjusted p < 0.05)."
    better, same = row_of(table, "RandLoRA-6"), row_of(table, "VeRA-256")
    assert (better["Verdict"].text, better["Verdict"].below, better["Verdict"].best) == ("better", "p = 0.047", True)
    assert (same["Verdict"].text, same["Verdict"].best) == ("no difference found", False)
    assert [cell.best for row in table.rows for cell in row].count(True) == 1
    assert (better["a 1-shot"].text, better["a 1-shot"].below) == ("+2.0", "± 0.0")
    assert better["a 1-shot"].tint == pytest.approx(0.5) and same["a 1-shot"].tint == 0
    assert better["Mean difference"].text == "+2.00 ± 0.00"


@pytest.mark.parametrize(
    ("gains", "said", "verdict"),
    [
        ([-2.0] * 7, f"{B32}: LoRA-32 is better than RandLoRA-6.", ("worse", "p = 0.016")),
        (
            [(-1.0) ** n for n in range(7)],
            "No difference was found in the 1 pair of methods that could be tested.",
            ("no difference found", "p = 1"),
        ),
    ],
)
def test_a_method_that_is_worse_or_as_good_is_not_marked(
    tmp_path: Path, gains: list[float], said: str, verdict: tuple[str, str]
) -> None:
    sweep = swept(tmp_path, better_by(dict(zip(DATASETS, gains, strict=True))))
    lines, table = told(sweep)
    cell = row_of(table, "RandLoRA-6")["Verdict"]
    assert lines[0] == said and (cell.text, cell.below, cell.best) == (*verdict, False)
    (pair,) = versus_table(comparisons(sweep)).rows
    assert (pair[3].text == "LoRA-32 is better") == pair[3].best == (verdict[0] == "worse")


@pytest.mark.parametrize("gone", ["VeRA-256", "RandLoRA-6"])
def test_planned_pairs_without_common_runs_are_named(tmp_path: Path, gone: str) -> None:
    """One of two pairs has runs, or none has: then no sentence is about the pair that was not planned."""
    pairs = [["RandLoRA-6", "LoRA-32"], ["VeRA-256", "RandLoRA-6"]]
    content = {"methods": THREE, "tuned": provenance(THREE), "pairs": pairs, "paper": None, "budgets": [1]}
    content |= {"models": {B32: MODELS[B32]}, "datasets": DATASETS, "seeds": [1, 2, 3, 4, 5]}
    more = better_by(dict.fromkeys(DATASETS, 2.0))
    folder = write_sweep(tmp_path, description(**content), keep=lambda labels: labels["method"] != gone, more=more)
    sweep = read_sweep(folder)
    found = comparisons(sweep)
    lines = conclusion(sweep, found, references(sweep, found))
    without = [
        f"No verdict for {first} against {second} on {B32}: they have no finished training runs in common."
        for first, second in pairs
        if gone in (first, second)
    ]
    if gone == "RandLoRA-6":
        assert lines == ["This sweep cannot show which method is more accurate.", *without] and len(without) == 2
    else:
        assert lines[0] == f"{B32}: RandLoRA-6 is better than LoRA-32." and lines[2:-1] == without
        assert "in 1 of the 1 pair of methods that could be tested, of 2 planned" in lines[1] and len(without) == 1
        assert lines[-1].startswith(f"{B32}: RandLoRA-6 against LoRA-32, ")


def test_cells_are_differences_seed_by_seed(sweep: Sweep) -> None:
    found = references(sweep, comparisons(sweep))
    assert [(one.model, one.method) for one in found] == [(B32, "LoRA-32"), ("CLIP-ViT-L/14", "LoRA-32")]
    table = matrix_table(sweep, found[0])
    ours, theirs = (sweep.by_seed(Key(B32, "cars", "4-shot", name)) for name in ("NoLA", "LoRA-32"))
    mean = sum(ours[seed] - theirs[seed] for seed in (1, 2, 3)) / 3
    cell = row_of(table, "NoLA")["cars mean over budgets"]  # 20 columns would be too many
    assert f"4-shot: {mean:+.2f} ± " in cell.title and "over 3 seeds" in cell.title
    assert cell.text == f"{cell.sort:+.1f}" and len(table.header) == 4 + 5


def test_a_cell_without_a_pair_says_why(tmp_path: Path) -> None:
    content = description(models={B32: {}}, datasets=["cars", "dtd"], budgets=[1, 4])
    gone = {"method": "NoLA", "dataset": "cars", "budget": "1-shot"}
    fails = lambda labels: "out of memory" if gone.items() <= labels.items() else None  # noqa: E731
    table = told(read_sweep(write_sweep(tmp_path, content, fail=fails)))[1]
    cell = row_of(table, "NoLA")["cars 1-shot"]
    assert (cell.text, cell.missing, cell.sort, cell.title) == ("-", True, None, "failed: out of memory")
