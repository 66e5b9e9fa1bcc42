"""Cells are ordinary runs, whatever ran before them in the same process."""

import gc
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from randlora_pl.commands.main import main
from randlora_pl.models import load_clip
from randlora_pl.sweep import SweepConfig
from randlora_pl.sweep.folder import DONE, SweepFolder
from randlora_pl.sweep.loop import Runner
from randlora_pl.sweep.plan import Cell, plan
from randlora_pl.tasks import AdaptationModule
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.reuse import caching
from randlora_pl.utils.run_files import read_results
from tests.support.products import marked
from tests.sweep.grids import GRID, cells_of
from tests.tasks.small import two_blocks

METHODS = {
    "RandLoRA-6": {"adapter": "RandLoRA", "rank": 6},
    "full": {"adapter": "FullFineTuning"},
    "probe": {"config": "linear_probe"},
    "text head": {"adapter": "LoRA", "rank": 2, "task": "TextHeadTask"},
    "zero-shot": None,
}


@pytest.fixture(autouse=True)
def _small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path / "cache"))
    with two_blocks():
        yield


def run(cell: Cell, folder: SweepFolder, runner: Runner | None = None) -> Path:
    place = folder.begin(cell)
    (runner or Runner())(cell, place)
    return place


def test_a_signal_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = next(cell for cell in cells_of(methods=METHODS) if cell.untrained)
    folder = SweepFolder(tmp_path)
    end = AdaptationModule.on_test_epoch_end

    def terminate(module: AdaptationModule) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        end(module)

    monkeypatch.setattr(AdaptationModule, "on_test_epoch_end", terminate)
    assert Runner()(cell, folder.begin(cell)) is True and folder.state(cell) == DONE
    monkeypatch.setattr(AdaptationModule, "on_test_epoch_end", end)
    assert Runner()(cell, SweepFolder(tmp_path / "other").begin(cell)) is False


@pytest.mark.slow
def test_cells_one_after_the_other_are_bit_for_bit_those_alone(tmp_path: Path) -> None:
    cells = cells_of(methods=METHODS)
    with caching():
        row = {cell.labels.method: run(cell, SweepFolder(tmp_path / "row")) for cell in cells}
    for cell in cells:
        alone = run(cell, SweepFolder(tmp_path / "alone" / cell.hash))
        figures, expected = read_results(row[cell.labels.method]), read_results(alone)
        assert figures["finished"] is True and figures["device"] == "cpu" and figures["cell_seconds"] > 0
        for key in ("test/acc", "test/loss", "trainable_parameters", "base/weights_hash"):
            assert figures[key] == expected[key], (cell.labels, key)
        if not cell.untrained:
            one, other = (place / "adapter" / "adapter.safetensors" for place in (row[cell.labels.method], alone))
            assert one.read_bytes() == other.read_bytes(), cell.labels


def test_a_cell_is_the_run_that_fit_makes_of_its_config(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """It prints nothing, and its log has it."""
    cell = cells_of()[0]
    with caplog.at_level("INFO", "randlora_pl"):  # as the command line sets it
        place = run(cell, SweepFolder(tmp_path / "sweep"))
    assert capfd.readouterr().out == ""
    assert "parameters" in (place / "run.log").read_text()
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    words = ("--trainer.enable_progress_bar", "false", "--run.root", str(tmp_path / "runs"))
    assert main(["fit", "--config", str(place / "config.yaml"), *words]) == 0
    (fitted,) = (tmp_path / "runs").glob("*/2*")
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    name = "adapter/adapter.safetensors"
    assert (place / name).read_bytes() == (fitted / name).read_bytes()
    assert read_results(place)["test/acc"] == read_results(fitted)["test/acc"]


class _StopError(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("damage",), marked(zip([False, True]), lambda row: row[0] in (False,)))
def test_a_broken_off_cell_ends_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bool
) -> None:
    cell = cells_of(set=GRID["set"] | {"data.steps": 4, "checkpoint.every_n_steps": 1})[0]
    whole = run(cell, SweepFolder(tmp_path / "whole"))
    folder = SweepFolder(tmp_path / "broken")
    step = AdaptationModule.training_step
    seen: list[int] = []

    def broken(self: AdaptationModule, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        seen.append(number)
        if len(seen) == 3:
            raise _StopError
        return step(self, batch, number)

    monkeypatch.setattr(AdaptationModule, "training_step", broken)
    with pytest.raises(_StopError):
        run(cell, folder)
    last = folder.cell_path(cell) / "checkpoints" / "last.ckpt"
    assert last.is_file()
    if damage:
        last.write_bytes(last.read_bytes()[:-100])
    run(cell, folder)
    assert seen == [0, 1, 2, *((0, 1) if damage else ()), 2, 3]
    name = "adapter/adapter.safetensors"
    assert (whole / name).read_bytes() == (folder.cell_path(cell) / name).read_bytes()
    assert read_results(folder.cell_path(cell))["test/acc"] == read_results(whole)["test/acc"]


@pytest.mark.slow
def test_a_cell_starts_from_the_lora_of_its_first_stage_which_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"adapter": "LoRA", "rank": 2, "set": {"data.steps": 3}}
    methods = {
        "beside": {"first": first, "adapter": "RandLoRA", "rank": 6},
        "absorbed": {"first": first | {"form": "absorbed"}, "adapter": "RandLoRA", "rank": 6},
        "alone": {"adapter": "RandLoRA", "rank": 6},
    }
    cells = cells_of(methods=methods, set=GRID["set"] | {"data.steps": 2, "checkpoint.every_n_steps": 1})
    assert len({cell.hash for cell in cells}) == 3
    step, seen = AdaptationModule.training_step, []

    def broken(self: AdaptationModule, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        seen.append(self.objective.adapter.method())
        if len(seen) in (3, 6):
            raise _StopError
        return step(self, batch, number)

    monkeypatch.setattr(AdaptationModule, "training_step", broken)
    for cell, method in zip(cells[:2], ("Together", "RandLoRA"), strict=True):
        folder = SweepFolder(tmp_path / cell.labels.method)
        seen.clear()
        for _ in range(2):
            with pytest.raises(_StopError):
                run(cell, folder)
        place = run(cell, folder)
        # three steps and two, each time with one more that was broken off
        assert seen == ["LoRA"] * 4 + [method] * 3
        figures = read_results(place)
        assert (figures["from/form"], figures["steps"]) == (cell.labels.method, 2)
        first_figures = read_results(place / "first")
        assert first_figures["steps"] == 3 and figures["first/fit_seconds"] == first_figures["fit_seconds"]
        folder.succeed(cell, keep_adapters=False)
        assert not (place / "first").exists()


def test_an_error_at_the_start_of_the_second_stage_keeps_the_lora(tmp_path: Path) -> None:
    first = {"adapter": "LoRA", "rank": 64, "form": "absorbed", "set": {"data.steps": 1}}
    (cell,) = cells_of(methods={"x": {"first": first, "adapter": "RandLoRA", "rank": 3}})
    folder = SweepFolder(tmp_path)
    found = []
    for _ in range(2):
        with pytest.raises(UserError, match="lead is 64"):
            run(cell, folder)
        found.append((folder.cell_path(cell) / "first" / "results.json").stat().st_mtime_ns)
    assert found[0] == found[1], "trained once"


def test_a_resumed_second_stage_reads_its_data_where_they_are_now(tmp_path: Path) -> None:
    methods = {"x": {"adapter": "RandLoRA", "first": {"adapter": "LoRA"}}}
    (cell,) = plan(replace(SweepConfig.from_content(GRID | {"methods": methods}), root="new"))
    saved = {"model": cell.tree["model"], "data": {"dataset": "digits", "root": "old", "steps": 2}, "from_adapter": "x"}
    saved["trainer"] = {"accelerator": "gpu", "devices": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    config = Runner().command(cell, tmp_path, again=True).config
    assert config["data"] == saved["data"] | {"root": "new"}
    assert config["trainer"] == saved["trainer"] | {"accelerator": "cpu"} and config["from_adapter"] == "x"


def alive() -> int:
    """Bytes of the weights of all CLIP models that are in memory."""
    modules: list[Any] = [thing for thing in gc.get_objects() if type(thing).__name__ == "CLIP"]
    return sum(parameter.nbytes for module in modules for parameter in module.parameters())


@pytest.mark.slow
def test_memory_stays_flat_over_cells(tmp_path: Path) -> None:
    cells = cells_of(seeds=[1, 2, 3, 4], methods={"full": {"adapter": "FullFineTuning"}, "LoRA": {"adapter": "LoRA"}})
    weights = []
    gc.collect()
    before = alive()
    with caching():
        for cell in cells:
            run(cell, SweepFolder(tmp_path))
            weights.append(alive() - before)
    kept = sum(p.nbytes for p in load_clip("tiny", "random").model.parameters())
    assert weights == [kept] * len(cells), "the model that is kept, and no other, is alive after each cell"
