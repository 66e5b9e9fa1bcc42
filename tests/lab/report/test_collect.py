import json
import math
import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from pandas import isna

from randlora_pl.data.catalog import PAPER
from randlora_pl.lab.report.cells import Key, Sweep, budget_order, read_plan
from randlora_pl.lab.report.collect import read_cells, read_sweep
from randlora_pl.run.run_folder import LEASE, acquire, lease_on
from randlora_pl.utils.errors import UserError
from tests.lab.report.sweeps import DATASETS, METHODS, SIZES, description, figures_of, write_cell, write_sweep
from tests.support.leases import of_another_host
from tests.support.products import in_one_item

LABELS = {"model": "CLIP-ViT-B/32", "dataset": "cars", "budget": "1-shot", "method": "LoRA-32", "seed": 1}
SMALL = description(
    models={"CLIP-ViT-B/32": {}}, datasets=["cars"], budgets=[1], methods={"LoRA-32": METHODS["LoRA-32"]}
)


def one(folder: Path) -> Path:
    """A sweep of three seeds, of which one is there."""
    return write_sweep(folder / "sweep", SMALL, keep=lambda labels: labels["seed"] == 1, zeroshot=False)


def states(sweep: Sweep) -> dict[int | None, str]:
    return {None if isna(seed) else seed: status for seed, status in sweep.cells[["seed", "status"]].to_numpy()}


def test_every_planned_run_is_there_once(sweep: Sweep) -> None:
    cells = sweep.cells
    assert len(cells) == 2 * 5 * (4 * 6 * 3 + 1) and not sweep.warnings
    assert not cells.duplicated([*Key._fields, "seed"]).any()
    assert cells["state"].value_counts().to_dict() == {"finished": len(cells) - 13, "failed": 5, "not run": 8}
    assert (cells["accuracy"].isna() == (cells["state"] != "finished")).all()


def test_accuracies_are_those_of_the_files(sweep: Sweep, folder: Path) -> None:
    for run in read_cells(folder).dropna(subset="accuracy")[::37].to_dict("records"):
        figures = json.loads((folder / "cells" / run["cell"] / "results.json").read_text())
        labels = json.loads((folder / "cells" / run["cell"] / "cell.json").read_text())
        assert run["accuracy"] == pytest.approx(100 * figures["test/acc"], abs=1e-12)
        assert run["fit_seconds"] == figures["fit_seconds"] and run["adapter"] == figures["method"]
        assert all(run[name] == labels[name] for name in [*Key._fields, "seed"])


def test_states(tmp_path: Path) -> None:
    folder = one(tmp_path)
    failed = write_cell(folder, LABELS | {"seed": 2}, failed="two\nlines")
    assert states(read_sweep(folder)) == {1: "finished", 2: "failed: two lines", 3: "not run"}
    file = folder / "locks" / f"{failed.name}.lock"
    of_another_host(file)
    assert states(read_sweep(folder))[2] == "running"  # it is being tried again
    of_another_host(file, age=LEASE + 1)  # the process was killed
    assert states(read_sweep(folder))[2] == "failed: two lines"
    file.unlink()
    lease = lease_on(file)  # and another one goes on
    assert acquire(lease) and states(read_sweep(folder))[2] == "running"
    text = file.read_text()
    lease.release()
    file.write_text(text.replace(f"pid={os.getpid()}", f"pid={2**22 + 1}"))  # killed just now, which is known at once
    assert states(read_sweep(folder))[2] == "failed: two lines"
    write_cell(folder, LABELS | {"seed": 3}, figures={"zeroshot/acc": 0.3})
    assert states(read_sweep(folder))[3] == "unfinished"
    (failed / "results.json").write_text(json.dumps(figures_of(LABELS, 0.5)))
    assert states(read_sweep(folder))[2] == "finished", "a success beats an older failure"


def test_a_run_of_two_stages_has_the_time_of_both_or_none(tmp_path: Path) -> None:
    folder = one(tmp_path)
    (file,) = folder.glob("cells/*/results.json")
    facts = json.loads(file.read_text()) | {"fit_seconds": 2.0}
    for more, time in (
        ({}, 2.0),
        ({"from/form": "beside"}, None),
        ({"from/form": "beside", "first/fit_seconds": 3.5}, 5.5),
        ({"from/form": "beside", "first/fit_seconds": "3"}, None),
    ):
        file.write_text(json.dumps(facts | more))
        (found,) = read_sweep(folder).finished["fit_seconds"]
        assert found == time or (time is None and isna(found))


def test_damage_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    folder = one(tmp_path)
    results = write_cell(folder, LABELS | {"seed": 2}, figures_of(LABELS, 0.5)) / "results.json"
    results.write_text(results.read_text()[:40])
    nameless = write_cell(folder, LABELS | {"seed": 3}, figures_of(LABELS, 0.5))
    (nameless / "cell.json").write_text("{")
    (folder / "cells" / "empty").mkdir()
    sweep = read_sweep(folder)
    assert states(sweep) == {1: "finished", 2: "damaged: results.json is cut off or damaged", 3: "not run"}
    assert len(sweep.warnings) == 3
    for name in (f"{results.parent.name}/results.json", f"{nameless.name}/cell.json", "empty has no cell"):
        assert any(f"cells/{name}" in line for line in sweep.warnings)
    assert str(tmp_path) not in "".join(sweep.warnings)


@in_one_item("value", [None, "0.5", True, float("nan"), 63.5, -0.1])
def test_impossible_accuracies_are_not_used(tmp_path: Path, value: object) -> None:
    folder = one(tmp_path)
    write_cell(folder, LABELS | {"seed": 2}, figures_of(LABELS, 0.5) | {"test/acc": value})
    sweep = read_sweep(folder)
    assert "no accuracy from 0 to 1" in states(sweep)[2] and len(sweep.finished) == 1
    assert len(sweep.warnings) == 1


@in_one_item("value", [math.nan, math.inf, [0.5, math.nan], [], True, "1", None])
def test_figures_that_are_no_numbers_are_not_used(tmp_path: Path, value: object) -> None:
    folder = one(tmp_path)
    write_cell(folder, LABELS | {"seed": 2}, figures_of(LABELS, 0.5) | {"fit_seconds": value})
    cells = read_sweep(folder).cells.set_index("seed")
    assert cells["accuracy"][2] == 50 and isna(cells["fit_seconds"][2])


@pytest.mark.parametrize("name", ["zeroshot/acc", "test/acc"])
def test_accuracy_of_the_untrained_model(tmp_path: Path, name: str) -> None:
    folder = one(tmp_path)
    place = LABELS | {"budget": "zero-shot", "method": "zero-shot"}
    write_cell(folder, place, {name: 0.25, "finished": True})
    assert list(read_sweep(folder).select(budget="zero-shot")["accuracy"]) == [25.0]


def test_two_configs_of_one_cell(tmp_path: Path) -> None:
    folder = one(tmp_path)
    (first,) = (folder / "cells").iterdir()
    second = folder / "cells" / "000000000000"
    second.mkdir()
    (second / "cell.json").write_text((first / "cell.json").read_text())
    (second / "results.json").write_text(json.dumps(figures_of(LABELS, 0.99)))
    for newer, older, accuracy in ((second, first, 99.0), (first, second, None)):
        os.utime(older / "results.json", (1e9, 1e9))
        os.utime(newer / "results.json", (2e9, 2e9))
        sweep = read_sweep(folder)
        (run,) = sweep.finished.to_dict("records")
        assert run["cell"] == newer.name and (accuracy is None or run["accuracy"] == accuracy)
        assert len(sweep.warnings) == 1 and f"{newer.name} is used" in sweep.warnings[0]


def test_cells_outside_the_plan_are_shown(tmp_path: Path) -> None:
    folder = one(tmp_path)
    write_cell(folder, LABELS | {"method": "new", "budget": "2-shot"}, figures_of(LABELS, 0.5))
    sweep = read_sweep(folder)
    assert list(sweep.plan.methods) == ["LoRA-32", "new"] and sweep.plan.budgets == ["1-shot", "2-shot"]
    assert Key("CLIP-ViT-B/32", "cars", "2-shot", "new") in sweep.accuracies
    assert list(sweep.cells[sweep.cells["state"] == "not run"]["method"]) == ["LoRA-32"] * 2, "nothing else is missing"


def test_without_a_plan_nothing_is_missing(tmp_path: Path) -> None:
    folder = one(tmp_path)
    (folder / "sweep.yaml").unlink()
    sweep = read_sweep(folder)
    assert states(sweep) == {1: "finished"} and "sweep.yaml is missing" in sweep.warnings[0]
    assert sweep.plan.seeds == [1]


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exist"):
        read_sweep(tmp_path / "none")
    with pytest.raises(UserError, match=r"sweep\.yaml"):
        read_sweep(tmp_path)
    folder = write_sweep(tmp_path / "sweep", SMALL, fail=lambda labels: "out of memory", zeroshot=False)
    with pytest.raises(UserError, match="finished"):
        read_sweep(folder)
    with pytest.raises(UserError, match=r"sweep\?"):
        read_sweep(tmp_path)
    (folder / "sweep.yaml").rename(folder / "tune.yaml")
    with pytest.raises(UserError, match=r"/sweep/tuning\.md"):
        read_sweep(folder)


TABLE = """\
model,family,dataset,budget,method,seed,state,accuracy,test/acc/boolq,test/acc/piqa,adapter,trainable,version
qwen2,,commonsense,15k,LoRA,1,finished,61.5,60.5,62.5,LoRA,5960000,0.2
qwen2,,commonsense,15k,LoRA,2,failed,,,,,,
qwen2,,commonsense,15k,LoRA,,missing,,,,,,
"""


def test_empty_fields_of_a_table_are_missing(tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text(TABLE)
    cells = read_cells(tmp_path)
    assert list(cells["seed"].fillna(0)) == [0, 1, 2] and list(cells["state"]) == ["missing", "finished", "failed"]
    assert not cells["family"].any() and not cells["reason"].any() and cells["accuracy"].count() == 1
    finished = cells.set_index("state").loc["finished"]
    assert (finished["accuracy"], finished["test/acc/piqa"], finished["version"]) == (61.5, 0.625, "0.2")
    assert finished["trainable"] == 5_960_000 and cells["version"].count() == 1


B32, L14 = "CLIP-ViT-B/32", "CLIP-ViT-L/14"


def read_all(folder: Path) -> dict[tuple[str, ...], dict[int, float]]:
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for place in (folder / "cells").iterdir():
        labels = json.loads((place / "cell.json").read_text())
        if (place / "results.json").exists():
            key = tuple(labels[name] for name in ("model", "dataset", "budget", "method"))
            figures = json.loads((place / "results.json").read_text())
            found.setdefault(key, {})[labels["seed"]] = 100 * figures["test/acc"]
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
    assert sweep.why_missing(Key(L14, "eurosat", "1-shot", "full fine-tuning")).startswith("failed: CUDA out of memory")
    assert sweep.why_missing(Key(B32, "oxfordpets", "16-shot", "NoLA")) == "not run"


def test_seeds_that_not_every_data_set_has(sweep: Sweep) -> None:
    average = sweep.average(B32, "4-shot", "RandLoRA-6", tuple(DATASETS))
    assert average is not None and average.seeds == (1, 3) and average.all_seeds == (1, 2, 3)
    assert len(average.estimate.values) == 2 and average.estimate.half is not None


def test_fewer_than_two_common_seeds_have_no_interval(tmp_path: Path) -> None:
    methods, apart = {"LoRA-32": METHODS["LoRA-32"]}, {"cars": (1, 2), "dtd": (2, 3)}
    content = description(models={B32: {}}, datasets=["cars", "dtd"], budgets=[1], methods=methods)
    sweep = read_sweep(write_sweep(tmp_path, content, lambda cell: cell["seed"] in apart[cell["dataset"]]))
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


def plan_of(folder: Path, content: Any) -> Any:
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (folder / "sweep.yaml").write_text(text)
    return read_plan(folder)


def test_cells_are_the_product(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, description())
    assert plan.budgets == ["1-shot", "4-shot", "16-shot", "100%"]
    assert len(list(plan.cells())) == 2 * 5 * 4 * 6
    assert plan.paper_name("full fine-tuning") == "FT"
    assert plan.paper_name("RandLoRA-6", "CLIP-ViT-L/14") == "RandLoRA10"
    assert plan.paper_name("RandLoRA-6", "CLIP-ViT-B/32") == "RandLoRA-6"


def test_a_method_for_some_models_and_the_untrained_model_once_for_each_data_set(tmp_path: Path) -> None:
    methods = {"A": {"adapter": "LoRA", "models": ["CLIP-ViT-B/32"]}, "B": {"adapter": "LoRA"}, "zero-shot": {}}
    cells = list(plan_of(tmp_path, description(methods=methods)).cells())
    assert len(cells) == 5 * (4 + 2 * 4 + 2)
    assert {cell.budget for cell in cells if cell.method == "zero-shot"} == {"zero-shot"}
    assert "zero-shot" not in {cell.budget for cell in cells if cell.method != "zero-shot"}
    assert {cell.model for cell in cells if cell.method == "A"} == {"CLIP-ViT-B/32"}
    assert {cell.model for cell in cells if cell.method == "B"} == {"CLIP-ViT-B/32", "CLIP-ViT-L/14"}


@pytest.mark.parametrize(
    ("paper", "tables", "figure"),
    [
        ({"table": 11}, ["11"], None),
        (11, ["11"], None),
        ({"tables": [11, 12]}, ["11", "12"], None),
        ({"figure": 3}, ["11", "12", "13"], "3"),
        ({"figure": 2}, ["14"], "2"),
        (None, [], None),
    ],
)
def test_tables_of_the_paper(tmp_path: Path, paper: Any, tables: list[str], figure: str | None) -> None:
    plan = plan_of(tmp_path, description(paper=paper))
    assert (plan.tables, plan.figure) == (tables, figure)


def test_data_sets(tmp_path: Path) -> None:
    assert list(plan_of(tmp_path, description(datasets="all")).datasets) == list(PAPER)
    datasets = {"pets": {"dataset": "oxfordpets"}, "few": {"dataset": "cars", "root": "x"}}
    plan = plan_of(tmp_path, description(datasets=datasets))
    assert list(plan.datasets) == ["pets", "few"]
    assert plan.paper_name("pets") == "oxfordpets"
    assert plan.paper_name("few") == "few"  # other images: no number of the paper is beside it


def test_the_order_of_budgets() -> None:
    shuffled = ["100%", "16-shot", "other", "1-shot", "zero-shot", "50%", "2-shot"]
    assert sorted(shuffled, key=budget_order) == ["zero-shot", "1-shot", "2-shot", "16-shot", "50%", "100%", "other"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "cut off or damaged"), ("- 1", "does not describe a sweep"), ("models: x", "does not describe a sweep")],
)
def test_damage_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=f"sweep.yaml .*{message}"):
        plan_of(tmp_path, content)
