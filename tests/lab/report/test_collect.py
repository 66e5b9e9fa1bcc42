import json
import math
import os
from pathlib import Path

import pytest
from pandas import isna

from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.collect import read_cells, read_sweep
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.lease import LEASE, acquired, lease_on
from tests.lab.report.sweeps import METHODS, description, figures_of, write_cell, write_sweep
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
    assert acquired(lease) and states(read_sweep(folder))[2] == "running"
    text = file.read_text()
    lease.release()
    file.write_text(text.replace(f"pid={os.getpid()}", f"pid={2**22 + 1}"))  # killed just now, which is known at once
    assert states(read_sweep(folder))[2] == "failed: two lines"
    write_cell(folder, LABELS | {"seed": 3}, figures={"zeroshot/acc": 0.3})
    assert states(read_sweep(folder))[3] == "unfinished"


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


def test_a_success_beats_an_older_failure(tmp_path: Path) -> None:
    folder = one(tmp_path)
    write_cell(folder, LABELS | {"seed": 2}, figures_of(LABELS, 0.5), failed="once")
    assert states(read_sweep(folder))[2] == "finished"


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
    for name in (
        f"cells/{results.parent.name}/results.json",
        f"cells/{nameless.name}/cell.json",
        "cells/empty has no cell",
    ):
        assert any(name in line for line in sweep.warnings)
    assert str(tmp_path) not in "".join(sweep.warnings)


@in_one_item("value", [None, "0.5", True, float("nan"), 63.5, -0.1])
def test_impossible_accuracies_are_not_used(tmp_path: Path, value: object) -> None:
    folder = one(tmp_path)
    write_cell(folder, LABELS | {"seed": 2}, figures_of(LABELS, 0.5) | {"test/acc": value})
    sweep = read_sweep(folder)
    assert "no accuracy from 0 to 1" in states(sweep)[2] and len(sweep.finished) == 1
    assert len(sweep.warnings) == 1


@pytest.mark.parametrize("name", ["zeroshot/acc", "test/acc"])
def test_accuracy_of_the_untrained_model(tmp_path: Path, name: str) -> None:
    folder = one(tmp_path)
    place = LABELS | {"budget": "zero-shot", "method": "zero-shot"}
    write_cell(folder, place, {name: 0.25, "finished": True})
    assert list(read_sweep(folder).of(budget="zero-shot")["accuracy"]) == [25.0]


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


def test_cells_outside_the_plan_make_nothing_missing(tmp_path: Path) -> None:
    folder = one(tmp_path)
    write_cell(folder, LABELS | {"model": "another", "method": "new"}, figures_of(LABELS, 0.5))
    cells = read_sweep(folder).cells
    assert list(cells[cells["state"] == "not run"]["model"]) == ["CLIP-ViT-B/32"] * 2


@in_one_item("value", [math.nan, math.inf, [0.5, math.nan], [], True, "1", None])
def test_figures_that_are_no_numbers_are_not_used(tmp_path: Path, value: object) -> None:
    folder = one(tmp_path)
    write_cell(folder, LABELS | {"seed": 2}, figures_of(LABELS, 0.5) | {"fit_seconds": value})
    cells = read_sweep(folder).cells.set_index("seed")
    assert cells["accuracy"][2] == 50 and isna(cells["fit_seconds"][2])


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
