"""``sweep`` from the command line."""

import functools
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from randlora_pl.commands.main import main
from randlora_pl.commands.sweep_job import find_sweep
from randlora_pl.lab.report.cells import read_baselines
from randlora_pl.run.options.shipped import config_names
from randlora_pl.sweep import loop as cli_cells
from randlora_pl.sweep.loop import Outcome
from randlora_pl.sweep.plan import Cell, plan
from randlora_pl.utils.errors import UserError
from tests.faults.child import Command
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item, marked
from tests.sweep.grids import GRID, cells_of, written
from tests.tasks.small import two_blocks

SWEEP = Path("runs/sweeps/small")


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for place in sorted((folder / "cells").iterdir()):
        results = json.loads((place / "results.json").read_text())
        assert results["finished"] is True
        adapter = place / "adapter" / "adapter.safetensors"
        found[place.name] = {"acc": results["test/acc"], "adapter": adapter.read_bytes() if adapter.exists() else None}
    return found


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and the finished sweep, to be read only."""
    place = tmp_path_factory.mktemp("done")
    before = Path.cwd()
    os.chdir(place)
    try:
        methods = GRID["methods"] | {"zero-shot": None}
        with two_blocks():
            assert main(["sweep", str(written(place, methods=methods, baselines=True))]) == 0
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """The same, to be changed, in the current folder of `run`."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path / SWEEP


def test_each_cell_is_a_run_folder(done: Path) -> None:
    cells = cells_of(methods=GRID["methods"] | {"zero-shot": None})
    assert sorted(finished(done / SWEEP)) == sorted(cell.hash for cell in cells)
    for cell in cells:
        place = done / SWEEP / "cells" / cell.hash
        assert json.loads((place / "cell.json").read_text()) == cell.labels._asdict() | {"config": cell.flat}
        assert (place / "config.yaml").is_file() and not (place / "checkpoints").exists()
        assert (place / "adapter").exists() != cell.untrained
        assert (json.loads((place / "results.json").read_text())["trainable_parameters"] == 0) == cell.untrained
    assert yaml.safe_load((done / SWEEP / "sweep.yaml").read_text())["budgets"] == ["2-shot"]
    assert not list((done / SWEEP / "locks").iterdir()) and len(read_baselines(done / SWEEP, pytest.fail)) == 2


def test_dry_run_says_what_is_left(run: Run, copy: Path) -> None:
    before = sorted(copy.rglob("*"))
    written(Path(), seeds=[1, 2])
    result = run("sweep", "small.yaml", "--dry-run")
    assert result.code == 0
    rows = [line for line in result.out.splitlines() if "digits" in line]
    assert [(" done " in row, " open " in row, row.count("?")) for row in rows] == [
        (True, False, 0), (True, False, 0), (False, True, 1), (False, True, 1)
    ]  # fmt: skip
    assert "4 cells: 2 done, 2 open" in result.out and "Expected time for the rest" in result.out
    assert sorted(copy.rglob("*")) == before
    some = run("sweep", "small.yaml", "--dry-run", "--only", "seed=2", "--only", "method=LoRA-4")
    assert "1 cell: 1 open" in some.out  # the second does not replace the first
    unknown = run("sweep", "small.yaml", "--dry-run", "--output", "new")
    assert "not known for 4 cells" in unknown.out and not Path("new").exists()


def test_ctrl_c_full_disks_and_failures_say_how_to_go_on(run: Run, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(Path(), seeds=[1, 2])

    def full(*args: object) -> None:
        raise UserError("oh") from OSError(28, "No space left on device", "/x/y")

    with monkeypatch.context() as patched:
        patched.setattr(cli_cells.Runner, "__call__", Mock(side_effect=KeyboardInterrupt))
        result = run("sweep", "small.yaml")
    again = "resume with: randlora-pl sweep small.yaml\n"
    assert result.code == 130
    assert result.err == f"randlora-pl: interrupted; 2 of 4 cells are done in runs/sweeps/small; {again}"
    with monkeypatch.context() as patched:
        patched.setattr(cli_cells.Runner, "__call__", full)
        result = run("sweep", "small.yaml")
    assert result.code == 2 and "/x/y" in result.err
    assert not list(copy.glob("cells/*/failed.json"))

    monkeypatch.setattr(cli_cells.Runner, "__call__", Mock(side_effect=UserError("no memory; try less")))
    result = run("sweep", "small.yaml")
    assert result.code == 1 and "2 of 4 cells are done, 2 failed" in result.out
    assert "failed: tiny, digits, 2-shot, RandLoRA-6, seed 2: no memory; try less" in result.out
    assert "Retry them: randlora-pl sweep small.yaml --retry-failed" in result.out
    for more, tries in (((), 1), (("--retry-failed",), 2)):
        assert run("sweep", "small.yaml", *more).code == 1
        assert [json.loads(file.read_text())["tries"] for file in copy.glob("cells/*/failed.json")] == [tries] * 2


def test_time_that_is_up(run: Run, copy: Path) -> None:
    written(Path(), seeds=[1, 2])
    result = run("sweep", "small.yaml", "--max-hours", "1e-9")
    assert result.code == 0 and "2 of 4 cells are done" in result.out
    assert "Stopped, because the time is up. Resume with: randlora-pl sweep small.yaml --max-hours 1e-9" in result.out
    for file in copy.glob("cells/*/results.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"cell_seconds": 7200.0}))
    assert "Stopped, because the time is up" in run("sweep", "small.yaml", "--max-hours", "1").out, "expected to be"


TYPED = {"data.epochs": [[3]]}
TEXTS = {"config": "e2e_gpt2_medium", "set": {"model.pretrained": "random", "model.config_overrides": {"n_layer": 1}}}


@in_one_item(
    ("change", "said"),
    [
        ({"methods": {"x": {"adapter": "LoRA", "rang": 1}}}, "small.yaml: models.tiny with methods.x: Unknown option"),
        ({"metods": 1}, "Did you mean 'methods'"),
        (
            {"methods": {"x": {"adapter": "RandLoRA", "first": {"adapter": "LoRA", "rank": 9999}}}},
            "methods.x.first: LoRA: rank 9999 is larger",
        ),
        ({"set": {"data.batch_size": 0}}, "--data.batch_size: expected a whole number from 1"),
        ({"set": {"trainer.max_steps": [[3]]}}, "expected a whole number, not [[3]]"),
        ({"models": {"GPT-2": TEXTS}, "datasets": ["e2e"], "budgets": ["100%"], "set": TYPED}, "not [[3]]"),
        ({"datasets": ["cifar10", "dtd"]}, "2 datasets are not on this machine: cifar10, dtd."),
        ({"datasets": {"mine": {"dataset": "folder", "root": "nowhere"}}}, "mine should be"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    refused: Refused, change: dict[str, Any], said: str
) -> None:
    written(Path(), **change)
    root = ["--data.root", "."] if "datasets" in change else []  # the digits read none
    assert said in refused("sweep", "small.yaml", *root)


@in_one_item(
    ("words", "said"),
    [
        (["smal.yaml"], "Unknown config"),
        (["small.yaml", "--jobs", "0"], "--jobs is 0"),
        (["small.yaml", "--max-hours", "-1"], "--max-hours is -1"),
        (["small.yaml", "--shard", "²/4"], "--shard ²/4"),
        (["small.yaml", "--only", "metod=x"], "Did you mean 'method'"),
        (["small.yaml", "--slurm", "a=b"], "--slurm needs --launcher slurm"),
        (["small.yaml", "--launcher", "pbs"], "invalid choice"),
        (["small.yaml", "--dryrun"], "Did you mean '--dry-run'"),
        (["quickstart"], "a sweep has no key"),
        (["broken.yaml"], "broken.yaml"),
    ],
)
def test_bad_words(refused: Refused, words: list[str], said: str) -> None:
    written(Path())
    Path("broken.yaml").write_text("{")
    assert refused("sweep", *words).count(said) == 1


def test_not_under_torchrun_and_not_in_the_folder_of_another_sweep(refused: Refused, copy: Path) -> None:
    written(Path(), methods={"LoRA-4": {"adapter": "LoRA", "rank": 5}})
    assert "LoRA-4" in refused("sweep", "small.yaml")
    assert "rank 4 (here 5)" in refused("sweep", "small.yaml", "--dry-run")
    job = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ.update(job)  # of the copy that the fixture `run` made
    assert "torchrun" in refused("sweep", "small.yaml")


def test_one_command_gets_all_that_is_missing_or_they_are_left_out(run: Run, refused: Refused, tmp_path: Path) -> None:
    written(tmp_path, datasets=["cifar10", "digits", "dtd"])
    told = refused("sweep", "small.yaml", "--data.root", "here")
    assert "--root" in told
    dry = run("sweep", "small.yaml", "--data.root", "here", "--dry-run")
    assert dry.code == 0 and "6 cells: 6 open" in dry.out
    assert dry.out.endswith(
        "Not on this machine: cifar10, dtd. Get them:\n  randlora-pl data get cifar10 dtd --root here\n"
    )
    few = run("sweep", "small.yaml", "--data.root", "here", "--skip-missing", "--dry-run")
    assert "2 cells: 2 open" in few.out
    written(tmp_path, datasets=["cifar10"])
    assert "no cells left" in refused("sweep", "small.yaml", "--data.root", "here", "--skip-missing")


SHIPPED = [name.removeprefix("sweeps/") for name in config_names() if name.startswith("sweeps/")]


@functools.cache
def first_seed(name: str) -> list[Cell]:
    description = find_sweep(name)[1]
    return plan(replace(description, seeds=description.seeds[:1]))


PLANNED = ("cross_dataset", "methods", "prompts", "table11")


@pytest.mark.parametrize(("name",), marked(zip(SHIPPED), lambda row: row[0] in PLANNED, pytest.mark.slow))
def test_the_shipped_sweeps_say_how_many_runs_they_are(name: str) -> None:
    """Every name and option in them is right, too."""
    (file, description), cells = find_sweep(name), first_seed(name)
    head = " ".join(line.lstrip("# ") for line in file.read_text().splitlines() if line.startswith("#"))
    told, trained = re.search(r"([\d,]+) runs", head), sum(not cell.untrained for cell in cells)
    assert told and int(told[1].replace(",", "")) == trained * (len(description.seeds) - 1) + len(cells)
    assert len({cell.hash for cell in cells}) == len(cells)


def test_figure_3_is_made_of_the_cells_of_three_tables() -> None:
    figure, *tables = (
        {cell.hash for cell in first_seed(name)} for name in ("figure3", "table11", "table12", "table13")
    )
    assert figure == set().union(*tables)


@pytest.mark.parametrize(("name",), marked(zip(SHIPPED), lambda row: row[0] == "compare_bases", pytest.mark.slow))
@pytest.mark.usefixtures("deep")  # a sweep has prompts in four blocks
def test_the_shipped_sweeps_can_run(run: Run, tmp_path: Path, name: str) -> None:
    """Every method fits its model, without weights."""
    only_digits = name in ("compare_bases", "compare_methods", "own_data")  # they read no root
    root = [] if only_digits else ["--data.root", str(tmp_path)]
    result = run("sweep", name, "--dry-run", "--only", "seed=1", *root)
    assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.usefixtures("deep")  # as in processes of their own
def test_killed_four_times_it_ends_the_same(tmp_path: Path) -> None:
    steps = {"data.steps": 12, "checkpoint.every_n_steps": 1, "trainer.limit_test_batches": 1}
    config = written(tmp_path, set=GRID["set"] | steps)
    assert main(["sweep", str(config), "--output", str(tmp_path / "whole")]) == 0
    sweep, place = tmp_path / "killed", tmp_path / "place"
    place.mkdir()
    words = ["sweep", str(config), "--output", str(sweep)]

    moments = {"locks/*.lock": 1, "cells/*/checkpoints/last.ckpt": 1, "cells/*/adapter": 1, "cells/*/config.yaml": 2}
    killed = 0
    for pattern, count in moments.items():
        command = Command(words, place)
        until = time.monotonic() + 60
        while len([*sweep.glob(pattern)]) < count and command.process.is_alive() and time.monotonic() < until:
            time.sleep(0.005)
        command.send(signal.SIGKILL)
        killed += command.wait().code == -signal.SIGKILL
    assert killed >= 3  # on a busy machine one comes too late
    ended = Command(words, place).wait()
    assert ended.code == 0, ended.err
    assert finished(sweep) == finished(tmp_path / "whole")
    assert not list((sweep / "locks").iterdir())


@pytest.mark.slow
def test_several_processes_by_one_command(run: Run, tmp_path: Path) -> None:
    written(tmp_path)
    result = run("sweep", "small.yaml", "--jobs", "2", "--output", "out")
    assert result.code == 0, [log.read_text() for log in Path("out/logs").iterdir()]
    assert "2/2  " in result.out and "2 of 2 cells are done in out" in result.out
    assert len(list(Path("out/logs").iterdir())) == 2 and len(finished(Path("out"))) == 2


def test_baselines_wait_for_the_last_cell(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, baselines=True)
    measured: list[Path] = []
    monkeypatch.setattr("randlora_pl.lab.baselines.measure", lambda folder, _: measured.append(folder))
    for elsewhere in (1, 0):
        monkeypatch.setattr("randlora_pl.commands.sweep_job.work", lambda *_, n=elsewhere: Outcome(elsewhere=n))
        assert run("sweep", "small.yaml").code == 0
        assert measured == [SWEEP] * (not elsewhere)


@pytest.mark.slow  # the search alone is a test of `tune`
def test_rates_are_searched_and_then_run_as_one_command(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"LoRA-4": GRID["methods"]["LoRA-4"], "zero-shot": None}
    steps = GRID["set"] | {"data.steps": 3}
    written(tmp_path, methods=methods, set=steps, tune={"search": {"learning_rate": [1e-3, 1e-2]}, "seeds": [0]})
    plain, begun = cli_cells.Runner.__call__, []

    def interrupted(self: cli_cells.Runner, cell: Cell, folder: Path) -> None:
        begun.append(cell.labels)
        if len(begun) in (2, 5):
            raise KeyboardInterrupt
        plain(self, cell, folder)

    monkeypatch.setattr(cli_cells.Runner, "__call__", interrupted)
    for _ in range(2):  # once in the search, once in the sweep
        stopped = run("sweep", "small.yaml", "--tune")
        assert stopped.code == 130 and "--tune" in stopped.err
    ended = run("sweep", "small.yaml", "--tune", "--only", "method=LoRA-4", "budget=2-shot")
    assert ended.code == 0 and len(begun) == 6 and "1 of 1 cells are done in runs/sweeps/small" in ended.out
    told = yaml.safe_load((SWEEP / "sweep.yaml").read_text())
    rate = told["tuned"]["methods"]["LoRA-4"]["chosen"]["learning_rate"]
    assert told["methods"]["LoRA-4"]["learning_rate"] == rate and told["tuned"]["finished"] is True
    assert run("report", str(SWEEP)).code == 0
    assert f"| LoRA-4 | tiny | validation | everywhere | {rate:g} |" in (SWEEP / "report/report.md").read_text()
    assert "--shard" in refused("sweep", "small.yaml", "--tune", "--shard", "1/2")


def test_the_record_of_a_search_must_be_there(refused: Refused, tmp_path: Path) -> None:
    written(tmp_path, tuned="gone.json")
    assert "gone.json" in refused("sweep", "small.yaml")
    entry = {"method": GRID["methods"]["LoRA-4"], "chosen": {"learning_rate": "fast"}}
    for wrong in (
        {"methods": 3},
        {"methods": {"LoRA-4": entry}},
        {"methods": {}, "models": [1]},
        {"methods": {"LoRA-4": {"method": 3}}},
        {"methods": {}, "datasets": 3},
    ):
        written(tmp_path, tuned=wrong)
        assert "chosen" in refused("sweep", "small.yaml", "--dry-run")
