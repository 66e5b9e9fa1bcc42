"""``tune`` from the command line, and the search behind it."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.commands.sweep import config_text, markdown
from randlora_pl.commands.sweep_job import find_sweep
from randlora_pl.data import ImageData
from randlora_pl.data.sources import ArrayImages
from randlora_pl.run.options.shipped import find_config
from randlora_pl.sweep import BEST, SweepConfig, chosen_for
from randlora_pl.sweep.climb import climbed
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.search import Search
from randlora_pl.utils.errors import UserError
from tests.support.cli import SMALL, Refused, Run
from tests.support.products import in_one_item, marked
from tests.sweep.grids import GRID, written

RATES = {"learning_rate": [1e-3, 1e-2, 1e30]}
TUNE = {"search": RATES, "sampler": "grid", "seeds": [0, 4]}
LORA = {"LoRA-4": {"adapter": "LoRA", "rank": 4, "paper_name": "LoRA4"}, "zero-shot": None}
LONG = GRID["set"] | {"data.steps": 3, "data.eval_batch_size": 64}


def search_of(folder: Path = Path("nowhere"), **changes: Any) -> Search:
    return Search(SweepConfig.from_content(GRID | {"tune": TUNE} | changes), SweepFolder(folder))


def one(rates: list[float], **settings: Any) -> dict[str, Any]:
    """The ``tune`` part of a search of rates with one seed."""
    return {"search": {"learning_rate": rates}, "rule": "best", "seeds": [0]} | settings


def scored(search: Search, figure: Callable[..., float | None]) -> None:
    """Finishes the cells that have begun to be asked for with made-up figures; None is a failure."""
    for cell in search.known():
        if search.folder.state(cell) != "open":
            continue
        value = figure(cell)
        if value is None:
            search.folder.fail(cell, "the loss is nan. Try less")
        else:
            (search.folder.begin(cell) / "results.json").write_text(json.dumps({"finished": True, "val/acc": value}))


def rates_of(search: Search, *seeds: int) -> set[float]:
    return {cell.facts["learning_rate"] for cell in search.known() if cell.labels.seed in seeds}


def test_of_equals_the_lowest_is_the_best(tmp_path: Path) -> None:
    assert climbed(range(4), 0, 2, lambda item: 0.5) == (range(3), 0)
    search = search_of(tmp_path, tune=one([1e-3, 1e-2]), methods=LORA)
    scored(search, lambda cell: 0.5)
    assert search.chosen() == {"LoRA-4": {"learning_rate": 1e-3}}


@given(data=st.data(), size=st.integers(1, 9))
def test_a_climb_ends_at_the_top_of_one_hill_and_only_ever_grows(data: st.DataObject, size: int) -> None:
    top, start = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    known: dict[int, float] = {}
    part, best = climbed(range(size), start - 1, start + 1, known.get)
    assert list(part) == [index for index in (start - 1, start, start + 1) if 0 <= index < size]
    while missing := [index for index in part if index not in known]:
        known[missing[0]] = -abs(missing[0] - top)
        assert best is None
        before, (part, best) = part, climbed(range(size), start - 1, start + 1, known.get)
        assert {*before} <= {*part} and (len(missing) == 1 or part == before)
    near = {i for i in (top - 1, top, top + 1) if 0 <= i < size}
    assert near <= {*part} and best == top, "the best and both its neighbours"


def test_a_search_that_climbs_leaves_out_what_is_far_from_the_best(tmp_path: Path) -> None:
    rates = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    methods = {"LoRA-4": {"adapter": "LoRA", "rank": 4, "learning_rate": 2e-3}}
    search = search_of(tmp_path, tune=one(rates, seeds=[0, 4]), methods=methods)
    heights = {1e-4: 0.2, 1e-3: 0.5, 1e-2: 0.6, 1e-1: None}
    for tried in ({1e-4, 1e-3, 1e-2}, {1e-4, 1e-3, 1e-2, 1e-1}):
        assert rates_of(search, 0) == tried and not rates_of(search, 4)
        scored(search, lambda cell: heights[cell.facts["learning_rate"]])
    assert rates_of(search, 0) == tried and rates_of(search, 4) == {1e-3, 1e-2}, "the failed one is the lowest"
    entries = search.report()["methods"]["LoRA-4"]["tried"]
    assert [entry["learning_rate"] for entry in entries] == [1e-4, 1e-3, 1e-2, 1e-1]
    climbs_on(search_of(tmp_path / "other", tune=one(rates, seeds=[0, 4]), methods=methods))


def climbs_on(search: Search) -> None:
    """The other seed makes the lowest rate that was tried the winner, and then the next one; the last one fails."""
    first, other = {1e-4: 0.5, 1e-3: 0.6, 1e-2: 0.1}, {1e-4: 0.8, 1e-3: 0.6, 1e-5: 0.9}

    def figure(cell: Any) -> float | None:
        return (first | {1e-5: 0.7} if cell.labels.seed == 0 else other).get(cell.facts["learning_rate"])

    scored(search, figure)
    for tried in ({1e-4, 1e-3}, {1e-4, 1e-3, 1e-5}, {1e-4, 1e-3, 1e-5}):
        assert rates_of(search, 4) == tried
        scored(search, figure)
    assert search.chosen() == {"LoRA-4": {"learning_rate": 1e-5}}
    assert search.finished() and "LoRA-4 (1e-05)" in search.remarks()[0]


def test_without_rates_a_climb_doubles_and_halves_the_own_rate(tmp_path: Path) -> None:
    methods = {"typed": {"adapter": "LoRA", "learning_rate": 3e-3}, "default": {"adapter": "LoRA", "rank": 2}}
    for rule in ("best", "lowest"):
        search = search_of(tmp_path, tune={"seeds": [0], "rule": rule}, methods=methods)
        first = {name: [values for (values,) in tried] for name, tried in search.tried().items()}
        assert first == {"typed": [1.5e-3, 3e-3, 6e-3], "default": [5e-4, 1e-3, 2e-3]}, "Table 8"


HEADS: dict[str, Any] = {
    "models": {"tower": {"config": {"model": {"class_path": "LinearHeadTask", "init_args": {"name": "tiny"}}}}},
    "methods": {"LoRA": {"adapter": "LoRA", "learning_rate": 1e-3}, "probe": {"config": "linear_probe"}},
}
TEXTS: dict[str, Any] = {"models": {"BERT": {"config": "glue_roberta_base"}}, "datasets": ["sst2"], "set": {}}
TEXTS |= {"budgets": ["100%"], "methods": HEADS["methods"] | {"probe": {"adapter": "LinearProbe"}}}
BOTH = ("learning_rate", "head_learning_rate")


@in_one_item(
    ("changes", "names"),
    [
        (HEADS, {"LoRA": BOTH, "probe": BOTH[1:]}),
        (TEXTS, {"LoRA": BOTH, "probe": BOTH[1:]}),
        ({}, {"RandLoRA-6": BOTH[:1], "LoRA-4": BOTH[:1]}),  # CLIP's head does not train
        (HEADS | {"tune": {"rule": "best"}}, {"LoRA": BOTH[:1], "probe": BOTH[1:]}),
        (HEADS | {"tune": {"search": {"learning_rate": [1e-3, 2e-3]}}}, {"LoRA": BOTH[:1], "probe": BOTH[1:]}),
        (HEADS | {"tune": {"search": {"head_learning_rate": [0.1]}}}, {"LoRA": BOTH[1:], "probe": BOTH[1:]}),
        ({"models": GRID["models"] | HEADS["models"]}, {"RandLoRA-6": BOTH[:1], "LoRA-4": BOTH[:1]}),  # not all train
    ],
)
def test_the_rate_of_a_trained_head_is_searched_beside_the_adapters(
    changes: dict[str, Any], names: dict[str, tuple[str, ...]]
) -> None:
    search = search_of(**{"tune": {}} | changes)
    assert {method: tuple(found) for method, found in search.names.items()} == names
    assert search.seeds == [0, 2, 3], "what the sweep does not use"
    heads = [remark for remark in search.remarks() if remark.startswith("The heads of LoRA learn at a rate")]
    assert len(heads) == ("LoRA" in names and BOTH[1] not in names["LoRA"])


def of_rates(cell: Any) -> float | None:
    """The best is at 8e-3 and 0.04, and an adapter's rate of 0.016 fails; seeds differ by little."""
    rate, head = (cell.facts.get(name) for name in BOTH)
    if rate is not None and rate > 0.01:
        return None
    lost = sum(0.02 * math.log2(value / best) ** 2 for value, best in ((rate, 8e-3), (head, 0.04)) if value)
    return 0.9 - lost + 0.03 * math.sin(1e4 * (rate or 0) + cell.labels.seed)


def test_both_rates_climb_with_equal_trials_and_the_lowest_are_chosen(tmp_path: Path) -> None:
    search = search_of(tmp_path, tune={}, **HEADS)
    while not search.finished():
        scored(search, of_rates)
    report = search.report()
    assert (report["rule"], report["seeds"], report["finalists"]) == ("lowest", [0, 2, 3], 4)
    for method, entry in report["methods"].items():
        assert len(entry["tried"]) == report["trials"] == 16 and entry["interior"], method
        finals = [each for each in entry["tried"] if len(each["val/acc"]) == 3]
        for each in entry["tried"]:
            assert each["val/acc"] == {seed: fmean(runs) for seed, runs in each.get("runs", {}).items()}
        best = max(finals, key=lambda each: sum(each["val/acc"].values()))
        assert len(finals) == 4 and all(entry["chosen"][name] <= best[name] for name in entry["chosen"])
    lora = report["methods"]["LoRA"]
    assert lora["chosen"] == {"learning_rate": 4e-3, "head_learning_rate": 0.04}, "not one step below what fails"
    assert {each["learning_rate"] for each in lora["tried"] if "failed" in each} == {0.016, 0.032}
    assert search.remarks() == []
    table = markdown(report, search.measure)
    assert "Every method had 16 trials, from its own rates with seed 0, and its best 4 ran with all seeds." in table
    assert "| LoRA | 0.004 | 0.04 | 0.008: -3.2; breaks at 0.016 | 0.08: -2.0; none tried breaks |" in table
    left = set(sorted(tmp_path.glob("cells/*/*.json"))[::7])  # what a kill may leave
    for place in tmp_path.glob("cells/*/*.json"):
        place.unlink() if place not in left else None
    again = search_of(tmp_path, tune={}, **HEADS)
    while not again.finished():
        scored(again, of_rates)
    assert again.report() == report


def test_a_sweep_is_read_again_after_a_large_search(tmp_path: Path) -> None:
    """A search on 22 datasets with six budgets has 132 runs of a candidate and a seed."""
    record = json.loads(find_config("offline").with_name("evidence_texts.tuned.json").read_text(encoding="utf-8"))
    for method in record["methods"].values():
        for each in method["tried"]:
            each["runs"] = {seed: runs * 66 for seed, runs in each["runs"].items()}
    (tmp_path / "record.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(GRID | {"tuned": "record.json"}), encoding="utf-8")
    _, description = find_sweep(str(tmp_path / "large.yaml"))
    SweepFolder(tmp_path / "out").open(description, [])
    read = SweepFolder(tmp_path / "out").description()
    assert read.tuned == description.tuned and read.tuned["methods"].keys() == record["methods"].keys()


TWO_RATES = ("evidence_texts", "chosen")
RECORDS = sorted(path.name.partition(".")[0] for path in find_config("offline").parent.glob("*.tuned.json"))


@pytest.mark.parametrize(
    ("name", "begun"),
    marked(
        [pair for pair in product(RECORDS, ["method", "chosen"]) if pair != TWO_RATES],
        [("offline", "method")].__contains__,
    ),
)
def test_a_replayed_record_gives_the_rates_that_were_chosen(name: str, begun: str, tmp_path: Path) -> None:
    """From the rate where it began and from the chosen one, the rule asks for no run that the record lacks.

    With two rates, a climb from elsewhere has other trials.
    """
    file, description = find_sweep(name)
    record = json.loads(file.with_name(f"{name}.tuned.json").read_text(encoding="utf-8"))
    facts = {label: description.methods[label] | entry[begun] for label, entry in record["methods"].items()}
    search = Search(replace(description, methods=facts), SweepFolder(tmp_path))
    if search.rule == BEST:  # the record has the means
        search.restrict("datasets", record["datasets"][:1])
        search.small = replace(search.small, budgets=record["budgets"][:1])
    assert search.seeds == record["seeds"] and search.monitor == record["monitor"]
    results: dict[str, dict[str, float]] = {}
    folder: Any = search.folder
    folder.results, folder.failure = lambda cell: results.get(cell.hash, {}), lambda cell: {}
    folder.state = lambda cell: "done" if cell.hash in results else "open"
    while missing := [cell for cell in search.known() if cell.hash not in results]:
        for cell in missing:
            rates = {key: value for key, value in cell.facts.items() if key != "tunes"}
            tried = record["methods"][cell.facts["tunes"]]["tried"]
            (entry,) = (each for each in tried if all(math.isclose(each[key], rate) for key, rate in rates.items()))
            seed, dataset = str(cell.labels.seed), record["datasets"].index(cell.labels.dataset)
            value = entry["runs"][seed][dataset] if "runs" in entry else entry[record["monitor"]].get(seed, -math.inf)
            results[cell.hash] = {record["monitor"]: value}
    assert search.chosen() == {label: entry["chosen"] for label, entry in record["methods"].items()}


def test_every_candidate_with_one_seed_and_the_two_best_with_all(tmp_path: Path) -> None:
    search = search_of(tmp_path, tune=TUNE | {"search": {"learning_rate": [1e-4, 1e-3, 1e-2, 1e30]}})
    assert len(search.known()) == 4 * 2
    first = {1e-4: 0.2, 1e-3: 0.5, 1e-2: 0.6}
    later = {1e-3: 0.9, 1e-2: 0.6}

    def figure(cell: Any) -> float | None:
        rate = cell.facts["learning_rate"]
        return (first if cell.labels.seed == 0 else later).get(rate)

    scored(search, figure)
    assert rates_of(search, 4) == {1e-3, 1e-2} and not search.finished()
    scored(search, figure)
    assert search.chosen() == {name: {"learning_rate": 1e-3} for name in GRID["methods"]} and search.finished()
    report = search.report()
    tried = report["methods"]["LoRA-4"]["tried"]
    assert [entry["val/acc"] for entry in tried] == [{"0": 0.2}, {"0": 0.5, "4": 0.9}, {"0": 0.6, "4": 0.6}, {}]
    assert tried[3]["failed"].startswith("the loss is nan")
    table = markdown(report, search.measure)
    assert "| LoRA-4 | learning_rate 0.001 | 50.0 | 90.0 | 70.0 | chosen |" in table
    assert "| LoRA-4 | learning_rate 1e+30 |  |  |  | failed: the loss is nan. Try less |" in table
    assert search.remarks() == []


def test_rates_climb_with_each_choice_of_another_option(tmp_path: Path) -> None:
    def figure(cell: Any) -> float:
        rank, rate = cell.facts["rank"], cell.facts.get("learning_rate", 8e-3)
        return 0.9 - 0.02 * math.log2(rate / 8e-3) ** 2 - 0.01 * abs(rank - 4) + 0.001 * cell.labels.seed

    for search, count in (
        ({"learning_rate": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "rank": [2, 4]}, 10),
        ({"rank": [2, 4]}, 2),
    ):
        tuned = search_of(tmp_path / str(count), tune={"search": search}, methods=LORA)
        while not tuned.finished():
            scored(tuned, figure)
        report = tuned.report()
        entry = report["methods"]["LoRA-4"]
        assert len(entry["tried"]) == count and entry["chosen"] == dict.fromkeys(search, 8e-3) | {"rank": 4}
        assert entry.get("interior", True) and tuned.remarks() == []
        some = "Every method had 8 trials, or all rates of a shorter list with each choice of the other options"
        assert (some in markdown(report, tuned.measure)) == (count == 10)


def test_a_method_without_an_option_that_is_searched_runs_as_it_is(tmp_path: Path) -> None:
    methods = LORA | {"full": {"adapter": "FullFineTuning"}}
    for sampler in ("climb", "grid"):
        search = search_of(tmp_path / sampler, tune={"search": {"rank": [2, 4]}, "sampler": sampler}, methods=methods)
        while not search.finished():
            scored(search, lambda cell: 0.5 + 0.1 * cell.facts.get("rank", 0))
        assert search.chosen() == {"LoRA-4": {"rank": 4}, "full": {}} and search.remarks() == []


def test_a_search_of_nothing_named_is_one_of_the_rates() -> None:
    search = search_of(tune={"search": {}}, **HEADS)
    assert search.rule == "lowest" and tuple(search.names["LoRA"]) == BOTH


def test_a_run_without_a_finite_metric_counts_as_failed(tmp_path: Path) -> None:
    search = search_of(tmp_path, tune=one([1e-3, 2e-3, 4e-3], rule="lowest"), methods=LORA)
    while not search.finished():
        scored(search, lambda cell: 0.9 - 10 * abs(cell.facts["learning_rate"] - 2e-3))
        for place in tmp_path.glob("cells/*"):
            if json.loads((place / "cell.json").read_text())["learning_rate"] == 4e-3:
                (place / "results.json").write_text('{"finished": true}')
        search = search_of(tmp_path, tune=one([1e-3, 2e-3, 4e-3], rule="lowest"), methods=LORA)
    report = search.report()
    (failed,) = (entry for entry in report["methods"]["LoRA-4"]["tried"] if "failed" in entry)
    assert failed == {"learning_rate": 4e-3, "val/acc": {}, "failed": "val/acc is not a finite number"}
    assert "| LoRA-4 | 0.002 | 0.004: failed; breaks at 0.004 |" in markdown(report, search.measure)


def test_a_method_of_models_that_are_left_out_is_not_searched(tmp_path: Path) -> None:
    models = {"tiny": GRID["models"]["tiny"], "other": {"config": "quickstart"}}
    methods = {"LoRA-4": {"adapter": "LoRA"}, "VeRA": {"adapter": "VeRA", "models": ["other"]}}
    search = search_of(tmp_path, models=models, methods=methods)
    search.restrict("models", ["tiny"])
    assert list(search.names) == ["LoRA-4"] and {cell.labels.model for cell in search.known()} == {"tiny"}
    scored(search, lambda cell: 0.5)
    assert list(search.report()["methods"]) == ["LoRA-4"]
    methods["VeRA"]["models"] = ["tiny", "other"]
    search = search_of(tmp_path, models=models, methods=methods, tune={"seeds": [0]})
    search.restrict("models", ["other"])
    assert {cell.labels.model for cell in search.known()} == {"other"} and "VeRA" in search.names


def test_a_rate_at_the_end_of_the_grid_and_equal_rates_are_remarked(tmp_path: Path) -> None:
    search = search_of(tmp_path / "a", tune=one([1e-3, 1e-2]), methods=LORA)
    scored(search, lambda cell: cell.facts["learning_rate"])
    assert [remark.split()[-2:] for remark in search.remarks()] == [["LoRA-4", "(0.01)"]]
    search = search_of(tmp_path / "b", tune=one([1e-3, 1e-2]), methods=LORA)
    scored(search, lambda cell: 0.1)
    assert "none can be selected: LoRA-4" in search.remarks()[-1]


def test_a_method_has_the_mean_over_data_sets_and_budgets(tmp_path: Path) -> None:
    datasets = {label: {"dataset": "digits", "steps": number} for number, label in enumerate("abc", 4)}
    tune = one([1e-3, 1e-2], datasets=["a", "b"], budgets=[2, 4])
    search = search_of(tmp_path, datasets=datasets, tune=tune, methods=LORA)
    assert len(search.known()) == 2 * 2 * 2
    better = {("a", "2-shot"): 0.9, ("a", "4-shot"): 0.1, ("b", "2-shot"): 0.1, ("b", "4-shot"): 0.1}
    scored(search, lambda c: better[c.labels[1:3]] if c.facts["learning_rate"] == 1e-2 else 0.4)
    assert search.chosen() == {"LoRA-4": {"learning_rate": 1e-3}}


def test_options_where_a_method_has_them_and_the_heads_rate_of_a_probe() -> None:
    methods = {"LoRA": {"adapter": "LoRA"}, "full": {"adapter": "FullFineTuning"}, "probe": {"config": "linear_probe"}}
    space = RATES | {"alpha": [1, 10], "data.batch_size": [8]}
    search = search_of(methods=methods, tune=TUNE | {"search": space})
    assert {method: tuple(names) for method, names in search.names.items()} == {
        "LoRA": ("learning_rate", "alpha", "data.batch_size"),
        "full": ("learning_rate", "data.batch_size"),
        "probe": ("head_learning_rate", "data.batch_size"),
    }
    assert [len(search.candidates(name)) for name in methods] == [6, 3, 3]
    flat = search.cells("LoRA", (1e-2, 10, 8), 0)[0].flat
    assert (flat["model.learning_rate"], flat["model.adapter.alpha"], flat["data.batch_size"]) == (0.01, 10, 8)
    assert flat["trainer.limit_val_batches"] == 1, "all validation images, whatever the sweep has"
    texts = {"models": {"BERT": {"config": "glue_roberta_base"}}, "datasets": ["sst2"], "budgets": ["100%"], "set": {}}
    search = search_of(methods={"head": {"adapter": "LinearProbe"}}, tune=TUNE, **texts)
    assert list(search.names["head"]) == ["learning_rate"], "the one rate of a task on texts"
    assert (search.monitor, search.sign) == ("val/loss", -1), "what a task on texts is tuned by"
    search = search_of(methods={"head": {"adapter": "LinearProbe"}}, tune=TUNE | {"monitor": "val/score"}, **texts)
    assert (search.monitor, search.sign) == ("val/score", 1)


def test_the_config_that_it_writes_is_the_sweep_with_the_best(tmp_path: Path) -> None:
    search = search_of(tmp_path, methods=LORA, tune=TUNE | {"search": RATES | {"data.batch_size": [8]}})
    for _ in range(2):
        scored(search, lambda cell: 1 - cell.facts["learning_rate"] / 1e31)
    text = config_text(search.tuned(), "# What it is\n")
    assert text.startswith("# What it is\ntitle: small\n")
    content = yaml.safe_load(text)
    assert content.pop("tuned") == "tuning.json"
    again = SweepConfig.from_content(content)
    best: Any = {"learning_rate": 1e-3, "set": {"data.batch_size": 8}}
    assert again.methods == {"LoRA-4": LORA["LoRA-4"] | best, "zero-shot": {}}  # type: ignore[operator]
    assert again.models == GRID["models"] and again.options == GRID["set"]
    model, method = again.models["tiny"], again.methods["LoRA-4"]
    assert chosen_for(search.report(), model, "LoRA-4", method) == search.chosen()["LoRA-4"]
    assert not chosen_for(search.report(), model, "LoRA-4", method | {"set": {"data.batch_size": 9}})


@in_one_item(
    ("change", "said"),
    [
        ({"tune": TUNE | {"search": {"learning_rate": [0]}}}, r"tune.search.learning_rate is \[0\]"),
        ({"tune": TUNE | {"search": {"rank": {"low": 1, "high": 9}}}}, "tune.search.rank is a range.*sampler: tpe"),
        ({"tune": TUNE | {"search": {"rank": {"low": 9, "high": 1}}}}, "tune.search.rank is.*give a list of values"),
        ({"tune": TUNE | {"search": {"rang": [1]}}}, "tune.search has 'rang', which no method has.*'rank'"),
        ({"tune": TUNE | {"search": {"lerning_rate": [1]}}}, "Did you mean 'learning_rate'"),
        ({"tune": TUNE | {"sampler": "tpa"}}, "tune.sampler is 'tpa': give climb, grid or tpe"),
        ({"tune": TUNE | {"pruner": "median"}}, "tune.pruner needs sampler: tpe"),
        ({"tune": TUNE | {"sampler": "tpe", "trials": 0}}, "tune.trials is 0"),
        ({"tune": TUNE | {"trials": 9}}, "tune.trials needs sampler: tpe, or climb with rule: lowest"),
        ({"tune": TUNE | {"rule": "lowest"}}, "tune.rule needs sampler: climb"),
        ({"tune": {"rule": "low"}}, "tune.rule is 'low': give lowest or best"),
        ({"tune": TUNE | {"search": {"data.shots": [1, 2]}}}, "data.shots: that is what budgets are for"),
        ({"tune": TUNE | {"seeds": [1, 2]}}, "seeds and tune.seeds both contain 1"),
        ({"tune": TUNE | {"datasets": ["digit"]}}, "tune.datasets has 'digit'.*Did you mean 'digits'"),
        ({"tune": TUNE | {"set": {"trainer": {"val_check_interval": 9}}}}, "tune.set has trainer.val_check_interval"),
        ({"methods": {"x": {"adapter": "LoRAA"}}}, "methods.x: Unknown adapter"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        search_of(**change).known()


def test_a_search_from_beginning_to_end_reads_no_test_image(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, methods=LORA, tune=TUNE | {"search": {"learning_rate": [1e-3, 1e30]}}, set=LONG)
    data = ImageData(dataset="digits")
    data.setup()
    test, val = (set(data.samples(split).rows.tolist()) for split in ("test", "val"))
    read: set[int] = set()
    load = ArrayImages.load

    def noted(self: ArrayImages, index: int, short: int = 0) -> Any:
        read.add(int(index))
        return load(self, index, short)

    monkeypatch.setattr(ArrayImages, "load", noted)
    monkeypatch.setattr(ImageData, "test_dataloader", lambda self: pytest.fail("the test images were asked for"))
    result = run("tune", "small.yaml")
    assert result.code == 0, result.err
    assert read & val == val, "all validation images were seen, so that reading was noticed"
    assert not read & test
    assert "| LoRA-4 | learning_rate 1e+30 |  |  |  | failed: the loss is nan" in result.out
    assert "Written: runs/tune/small/tuned.yaml, tuning.md and tuning.json" in result.out
    assert "Next: randlora-pl sweep runs/tune/small/tuned.yaml" in result.out
    report = json.loads(Path("runs/tune/small/tuning.json").read_text())
    assert sorted(map(len, (e["val/acc"] for e in report["methods"]["LoRA-4"]["tried"]))) == [0, 2]
    figures = [json.loads(file.read_text()) for file in Path("runs/tune/small/cells").glob("*/results.json")]
    assert not [key for found in figures for key in found if key.startswith(("test/", "zeroshot/"))]
    for place in Path("runs/tune/small/cells").iterdir():
        assert (place / "failed.json").exists() or not (place / "adapter").exists()
    _, tuned = find_sweep("runs/tune/small/tuned.yaml")
    assert chosen_for(tuned.tuned, tuned.models["tiny"], "LoRA-4", tuned.methods["LoRA-4"])
    assert tuned.methods["LoRA-4"]["learning_rate"] == report["methods"]["LoRA-4"]["chosen"]["learning_rate"]
    shutil.rmtree(sorted(Path("runs/tune/small/cells").glob("*/results.json"))[0].parent)
    stopped = run("tune", "small.yaml", "--max-hours", "1e-9")
    assert stopped.code == 0 and "Resume with: randlora-pl tune small.yaml --max-hours" in stopped.out
    assert run("tune", "small.yaml").out.count(", seed ") == 1, "it goes on where it stopped"
    assert json.loads(Path("runs/tune/small/tuning.json").read_text()) == report


def test_only_some_methods_and_what_is_refused(run: Run, refused: Refused, tmp_path: Path) -> None:
    written(tmp_path, tune=TUNE)
    dry = run("tune", "small.yaml", "--dry-run", "--only", "method=LoRA-4", "dataset=digits")
    assert dry.code == 0 and "3 cells: 3 open" in dry.out and "RandLoRA" not in dry.out
    assert "'LoRA-5'" in refused("tune", "small.yaml", "--only", "method=LoRA-5")
    assert "restricted" in refused("tune", "small.yaml", "--only", "seed=0")
    written(tmp_path, tune=TUNE, set=GRID["set"] | {"data.train_split": "full"})
    assert "validation" in refused("tune", "small.yaml")
    stages = {"adapter": "VeRA", "first": {"adapter": "LoRA", "form": "absorbed"}}
    written(tmp_path, tune=TUNE, methods={"x": stages})
    for command in (["tune", "small.yaml"], ["sweep", "small.yaml", "--tune"]):
        assert "VeRA cannot absorb a LoRA" in refused(*command, "--dry-run")
    written(tmp_path, methods=LORA, tune=TUNE)
    (tmp_path / "runs/sweeps/small/cells/0123").mkdir(parents=True)
    assert "--tune --output runs/sweeps/small-tuned" in refused("sweep", "small.yaml", "--tune")


@pytest.mark.slow
def test_the_rate_of_a_single_run(run: Run, refused: Refused, tmp_path: Path) -> None:
    words = [*SMALL[:-2], "--model.adapter", "LoRA", "--model.adapter.rank", "2"]
    search = ["--search", "learning_rate=1e-3,1e-2", "model.prompt=a,b"]
    assert "Unknown option --model.prompt" in refused("tune", *words, *search)
    result = run("tune", *words, "--output", "rates", *search[:-1])
    assert result.code == 0, result.err
    tuning = json.loads(Path("rates/tuning.json").read_text())
    rate = tuning["methods"]["LoRA"]["chosen"]["learning_rate"]
    assert f"Best learning_rate of LoRA: {rate:g}" in result.out and f"--model.learning_rate {rate:g}\n" in result.out
    cells = [json.loads(file.read_text())["config"] for file in Path("rates/cells").glob("*/cell.json")]
    assert {cell["model.adapter.rank"] for cell in cells} == {2} and {cell["data.shots"] for cell in cells} == {2}
    assert tuning["finished"] and tuning["seeds"] == [1, 2, 3] and tuning["budgets"] == ["2-shot"]
    assert "Did you mean" in refused("tune", "--config", "quickstart", "--data.shot", "2")


@pytest.mark.slow
def test_the_rates_of_a_run_with_a_head_by_two_processes(run: Run, tmp_path: Path) -> None:
    words = [*("--config", "quickstart", "--model", "LinearHeadTask", "--model.adapter", "LoRA"), "--data.steps", "2"]
    words += ["--data.shots", "2"]
    result = run("tune", *words, "--trials", "5", "--jobs", "2", "--output", "rates")
    assert result.code == 0, result.err
    tuning = json.loads(Path("rates/tuning.json").read_text())
    entry = tuning["methods"]["LoRA"]
    assert tuning["finished"] and tuning["trials"] == len(entry["tried"]) == 5 and set(entry["chosen"]) == set(BOTH)
    assert sorted(len(each["val/acc"]) for each in entry["tried"]) == [1, 3, 3, 3, 3]
    best = " ".join(f"--model.{name} {entry['chosen'][name]:g}" for name in BOTH)
    assert f"{best}\n" in result.out and "next higher head rate" in result.out
    assert run("tune", *words, "--trials", "5", "--output", "rates").code == 0
    assert json.loads(Path("rates/tuning.json").read_text())["methods"] == tuning["methods"], "nothing was left to run"
