"""A search by Optuna: the same trials however often it is interrupted, by several processes, and with pruning."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch

from randlora_pl.sweep import SweepConfig, chosen_for
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.plan import Cell
from randlora_pl.sweep.search import Search
from randlora_pl.utils.errors import UserError
from tests.support.cli import Run
from tests.sweep.grids import GRID, written

TUNE = {
    "search": {"learning_rate": {"low": 1e-4, "high": 1.0}, "rank": {"low": 1, "high": 32}, "rslora": [True, False]},
    "sampler": "tpe",
    "trials": 12,
    "seeds": [0, 4],
}
LORA = {"LoRA-4": {"adapter": "LoRA", "rank": 6, "learning_rate": 1e-3, "rslora": False}}


def search_in(folder: Path, **changes: Any) -> Search:
    description = SweepConfig.from_content(GRID | {"methods": LORA, "tune": TUNE | changes})
    SweepFolder(folder, "tune.yaml").open(description, [])
    return Search(description, SweepFolder(folder, "tune.yaml"))


def end(search: Search, cells: list[Cell]) -> None:
    """Finish the cells of candidates; the best has a rate of 0.01 and a low rank."""
    for cell in cells:
        value = 1 - abs(cell.facts["learning_rate"] - 0.01) - cell.facts["rank"] / 100
        if cell.facts["learning_rate"] > 0.5:
            search.folder.fail(cell, "the loss is nan")
        else:
            (search.folder.begin(cell) / "results.json").write_text(json.dumps({"finished": True, "val/acc": value}))


def candidates(search: Search) -> list[tuple[Any, ...]]:
    return search.candidates("LoRA-4")


def test_interrupted_at_each_trial_it_tries_the_same(tmp_path: Path) -> None:
    whole = search_in(tmp_path / "a")
    assert candidates(whole)[0] == (1e-3, 6, False), "the method's own values"
    end(whole, whole.known())
    while not whole.finished():
        end(whole, whole.known(ask=True))
    assert len(candidates(whole)) == 12 and whole.report()["finished"]
    assert {type(value) for value in candidates(whole)[0]} == {float, int, bool}
    (chosen,) = whole.chosen().values()
    assert chosen == whole.report()["methods"]["LoRA-4"]["chosen"] and abs(chosen["learning_rate"] - 0.01) < 0.05
    seeds = [cell.labels.seed for cell in whole.known()]
    assert seeds.count(4) == 2, "the best two with the other seed"
    tuned = whole.tuned()
    assert chosen_for(whole.report(), tuned.models["tiny"], "LoRA-4", tuned.methods["LoRA-4"]) == chosen
    again = search_in(tmp_path / "b")
    end(again, again.known())
    while not again.finished():
        begun = again.known(ask=True)  # and killed
        again = search_in(tmp_path / "b")
        assert again.known() == begun
        end(again, begun)
    assert candidates(again) == candidates(whole)


def test_processes_share_the_trials(tmp_path: Path) -> None:
    searches = [search_in(tmp_path, trials=5, seeds=[0]) for _ in range(2)]
    for number in range(8):
        searches[number % 2].known(ask=True)
    assert candidates(searches[0]) == candidates(searches[1]) and len(set(candidates(searches[0]))) == 5
    assert not searches[0].finished()
    end(searches[0], searches[0].known())
    assert searches[1].finished() and searches[0].finished()
    study = optuna.load_study(
        study_name=searches[0].study("LoRA-4").study.study_name,
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))),
    )
    assert all(trial.state.is_finished() for trial in study.trials)
    assert study.best_value == max(trial.value for trial in study.trials if trial.value is not None)


def test_another_space_is_another_study_of_the_same_cells(tmp_path: Path) -> None:
    search = search_in(tmp_path, trials=2, seeds=[0])
    while not search.finished():
        end(search, search.known(ask=True))
    other = TUNE["search"] | {"rslora": [False], "rank": [6, 8]}  # type: ignore[operator]
    again = search_in(tmp_path, trials=2, seeds=[0], search=other)
    assert len(again.known()) == 1 and again.candidates("LoRA-4") == search.candidates("LoRA-4")[:1]
    assert again.folder.state(again.known()[0]) == "done"


def test_a_loss_is_minimized(tmp_path: Path) -> None:
    search = search_in(tmp_path, trials=3, seeds=[0], monitor="val/loss")
    for number in range(3):
        for cell in search.known(ask=number > 0):
            results = {"finished": True, "val/loss": 3.0 - number}
            file = search.folder.begin(cell) / "results.json"
            if not file.exists():
                file.write_text(json.dumps(results))
    assert search.finished() and search.study("LoRA-4").study.best_value == 1.0
    assert search.best("LoRA-4", candidates(search), [0])[0] == candidates(search)[2]


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_run_that_is_worse_than_others_at_the_same_step_is_pruned(tmp_path: Path, pruner: str) -> None:
    search = search_in(tmp_path, pruner=pruner, seeds=[0])
    pruned = []
    for number in range(8):
        (cell,) = (cell for cell in search.known(ask=number > 0) if search.folder.state(cell) == "open")
        assert cell.flat["trainer.val_check_interval"] == 0.25
        watcher: Any = search.watcher(cell)
        try:
            for step in (1, 2, 3, 4):
                trainer: Any = SimpleNamespace(
                    callback_metrics={"val/acc": torch.tensor(0.1 * step - 0.02 * number)},
                    global_step=step,
                    estimated_stepping_batches=4,
                    sanity_checking=False,
                )
                watcher.on_validation_end(trainer, None)
        except UserError as error:
            pruned.append(number)
            assert "pruned after" in str(error) and "val/acc" in str(error)
            search.folder.fail(cell, str(error))
        else:
            results = {"finished": True, "val/acc": 0.4 - 0.02 * number}
            (search.folder.begin(cell) / "results.json").write_text(json.dumps(results))
    assert pruned and 0 not in pruned
    search.known()
    states = [trial.state for trial in search.study("LoRA-4").study.trials]
    assert [number for number, state in enumerate(states) if state == optuna.trial.TrialState.PRUNED] == pruned


def test_the_other_cells_of_a_pruned_candidate_are_dropped(tmp_path: Path) -> None:
    datasets = {"a": {"dataset": "digits"}, "b": {"dataset": "digits", "steps": 3}}
    tune = TUNE | {"pruner": "median"}
    description = SweepConfig.from_content(GRID | {"methods": LORA, "tune": tune, "datasets": datasets})
    search = Search(description, SweepFolder(tmp_path))
    SweepFolder(tmp_path).open(description, [])
    first, second = search.known()
    search.folder.fail(first, "pruned after 25 % of the steps")
    assert search.dropped(second) and search.known() == [first]


@pytest.mark.slow
def test_a_search_by_optuna_from_beginning_to_end(run: Run, tmp_path: Path) -> None:
    written(tmp_path, methods=LORA, set=GRID["set"] | {"data.steps": 4})
    space = ["learning_rate=1e-4..1", "rank=1..8"]
    words = ["tune", "small.yaml", "--search", *space, "--sampler", "tpe", "--pruner", "median", "--trials", "3"]
    dry = run(*words, "--dry-run")
    assert dry.code == 0 and "Optuna selects 3 candidates" in dry.out and not Path("runs").exists()
    result = run(*words, "--jobs", "2")
    assert result.code == 0, result.err
    record = json.loads(Path("runs/tune/small/tuning.json").read_text())
    assert record["finished"] and (record["sampler"], record["trials"], record["pruner"]) == ("tpe", 3, "median")
    assert set(record["methods"]["LoRA-4"]["chosen"]) == {"learning_rate", "rank"}
    assert run("sweep", "runs/tune/small/tuned.yaml", "--dry-run").code == 0
