"""Killed at any moment, a run goes on to the weights of an undisturbed one."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from randlora_pl.run.callbacks import Figures, RunCheckpoint, Throughput
from randlora_pl.tasks import AdaptationModule
from tests.support.cli import SMALL, Refused, Run
from tests.support.products import marked
from tests.tasks.small import two_blocks

LONG = [
    *SMALL,
    *("--data.steps", "8", "--trainer.accumulate_grad_batches", "2", "--checkpoint.every_n_steps", "3"),
    *("--model.adapter.dropout", "0.1", "--trainer.val_check_interval", "10"),
]


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `LONG` that nothing stopped."""
    from randlora_pl.commands.main import main

    root = tmp_path_factory.mktemp("undisturbed")
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    with two_blocks():
        assert main(["fit", *LONG, "--run.root", str(root)]) == 0
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    return next((root / "quickstart").glob("2*"))


CTRL_C = Mock(side_effect=KeyboardInterrupt)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt_at(batch: int, end: Callable[[], object] = CTRL_C) -> Callable[..., Any]:
    """A training step in which Ctrl-C is typed, or something else happens, before it trains on this batch."""
    plain = AdaptationModule.training_step

    def step(self: AdaptationModule, samples: dict[str, Any], batch_idx: int) -> torch.Tensor:
        if batch_idx == batch:
            end()
        return plain(self, samples, batch_idx)

    return step


@pytest.fixture(autouse=True)
def _ctrl_c_works_again() -> Iterator[None]:
    """Lightning ignores further Ctrl-C."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(("batch",), marked(zip([0, 3, 9, 11, 12, 15]), lambda row: row[0] == 11))
def test_interrupted_run_says_how_to_go_on(
    run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Ctrl-C before a batch: the first, in and between steps, after a validation, and the last."""
    with monkeypatch.context() as patched:
        patched.setattr(AdaptationModule, "training_step", interrupt_at(batch))
        result = run("fit", *LONG)
    assert result.code == 130
    if batch // 2 < 3:  # before the first checkpoint
        assert "checkpoint" in result.err
        if batch < 2:  # nothing was trained
            assert not (tmp_path / "runs").exists()
            return
    (folder,) = (tmp_path / "runs" / "quickstart").glob("2*")
    assert f"fit --resume {folder.relative_to(tmp_path)}" in result.err
    assert run("fit", "--resume", str(folder)).code == 0
    assert weights(folder) == weights(undisturbed)
    results, whole = (json.loads((place / "results.json").read_text()) for place in (folder, undisturbed))
    for key in ("test/acc", "test/loss", "zeroshot/acc", "val/acc", "best/val/acc", "best/step"):
        assert results[key] == whole[key], key


def test_run_killed_before_its_last_test_is_only_tested(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    """What is left when the process dies between the last checkpoint and the adapter folder."""
    folder = tmp_path / "killed"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "checkpoints/last.ckpt"):
        (folder / name).write_bytes((undisturbed / name).read_bytes())
    results = {k: v for k, v in json.loads((undisturbed / "results.json").read_text()).items() if "zeroshot" in k}
    (folder / "results.json").write_text(json.dumps(results))
    assert run("fit", "--resume", str(folder)).code == 0
    assert weights(folder) == weights(undisturbed)
    assert json.loads((folder / "results.json").read_text())["steps"] == 8


def test_what_is_typed_beats_the_config_and_older_files_are_kept(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    """Of a run that was killed before its first checkpoint, which starts again."""
    folder = tmp_path / "killed"
    (folder / "csv").mkdir(parents=True)
    (folder / "csv" / "metrics.csv").write_text("mine")
    (folder / "config.yaml").write_bytes((undisturbed / "config.yaml").read_bytes())
    words = ("--run.logger", "csv", "--model.learning_rate", "0.5", "--data.steps", "5")
    assert run("fit", "--resume", str(folder), *words).code == 0
    new, old = (yaml.safe_load((folder / name).read_text()) for name in ("config.yaml", "config.yaml.1"))
    assert new["model"]["init_args"]["learning_rate"] == 0.5
    assert old["model"]["init_args"]["learning_rate"] == 1e-3
    assert (folder / "csv" / "metrics.csv").read_text() == "mine" and (folder / "csv_2" / "metrics.csv").is_file()


@pytest.fixture
def stopped(undisturbed: Path, tmp_path: Path) -> Path:
    """A run of `LONG` that was killed after its last checkpoint."""
    folder = tmp_path / "runs" / "stopped" / "a"
    shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("adapter*", "tensorboard"))
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    figures = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(figures | {"finished": False}))
    assert checkpoint["global_step"] == 8
    return folder


def test_refused_resume_leaves_the_run_as_it_was(run: Run, stopped: Path) -> None:
    files = {path: path.read_bytes() for path in stopped.glob("config*")}
    for words in (
        "--model.adapter.dropout 0.5",
        "--seed_everything 4",  # of the bases: only the checkpoint knows
        "--trainer.accumulate_grad_batches 5 --trainer.max_epochs 2",  # only the data know
        "--data.steps 7",
    ):
        refused = run("fit", "--resume", str(stopped), *words.split())
        assert refused.code == 2, words
        assert {path: path.read_bytes() for path in stopped.glob("config*")} == files, words
    assert "8 steps are done" in refused.err and len(refused.err.splitlines()) == 1
    assert "sample order" not in refused.out
    assert run("fit", "--resume", str(stopped)).code == 0
    assert {path: path.read_bytes() for path in stopped.glob("config*")} == files, "nothing new, so no further file"
    assert json.loads((stopped / "results.json").read_text())["config"] == ["quickstart.yaml"]


@pytest.mark.slow
def test_checkpoint_to_start_from_stays_in_the_config(
    run: Run, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, "--run.logger", "none", "--data.steps", "4", "--checkpoint.every_n_steps", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(AdaptationModule, "training_step", interrupt_at(2))
        assert run("fit", *words, "--run.name", "first").code == 130
        (last,) = tmp_path.glob("runs/first/2*/checkpoints/last.ckpt")
        patched.setattr("randlora_pl.run.lightning_cli.remove_folder", lambda *_: None)  # as SIGKILL
        assert run("fit", *words, "--ckpt_path", str(last.relative_to(tmp_path))).code == 130
    (folder,) = (tmp_path / "runs" / "quickstart").glob("2*")
    assert not (folder / "checkpoints").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["ckpt_path"] == str(last)
    assert "--ckpt_path" in refused("fit", "--resume", str(folder), "--ckpt_path", str(last))
    steps: list[int] = []
    monkeypatch.setattr(RunCheckpoint, "on_train_start", lambda self, t, m: steps.append(t.global_step))
    assert run("fit", "--resume", str(folder)).code == 0
    assert steps == [2]
    assert run("test", "--run", str(folder), "--run.root", "tests").code == 0


def test_sigterm_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(AdaptationModule, "training_step", interrupt_at(1, terminate))
    result = run("fit", *SMALL, "--checkpoint.every_n_steps", "1")
    assert result.code == 143
    (folder,) = (tmp_path / "runs" / "quickstart").glob("2*")
    assert result.err.endswith(f"terminated; resume with: randlora-pl fit --resume {folder.relative_to(tmp_path)}\n")


def test_run_that_ran_out_of_time_is_not_finished(run: Run, tmp_path: Path, refused: Refused) -> None:
    words = ("--trainer.max_time", "00:00:00:00", "--checkpoint.every_n_steps", "1")
    result = run("fit", *SMALL, *words)
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "runs" / "quickstart").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    assert results["finished"] is False and results["steps"] < 3
    assert f"randlora-pl fit --resume {folder.relative_to(tmp_path)}" in result.out
    assert run("fit", "--resume", str(folder), "--trainer.max_time", "00:01:00:00").code == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["finished"] is True and results["steps"] == 3
    shutil.rmtree(folder / "adapter")
    assert "--resume" in refused("test", "--run", str(folder))


@pytest.mark.slow
def test_resume_auto_goes_on_with_the_newest_run_unless_it_is_finished(
    run: Run, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command each time, as a job that is started again has it: also after a kill before the plots."""
    command = ("fit", *LONG, "--run.name", "job", "--resume=auto")
    with monkeypatch.context() as patched:
        patched.setattr(AdaptationModule, "training_step", interrupt_at(9, terminate))
        assert run(*command).code == 143
    with monkeypatch.context() as patched:
        patched.setattr(Figures, "on_test_end", interrupt_test)
        result = run(*command)
    assert result.code == 130 and "resumed after step" in result.out
    (folder,) = (tmp_path / "runs" / "job").glob("2*")
    assert not (folder / "figures" / "confusion.png").exists()
    trained = weights(folder)
    monkeypatch.setattr(AdaptationModule, "training_step", interrupt_at(0))
    assert run(*command).code == 0
    assert weights(folder) == trained == weights(undisturbed)
    assert (folder / "figures" / "confusion.png").exists()
    assert json.loads((folder / "results.json").read_text())["config"] == ["quickstart.yaml"]
    result = run(*command)
    assert result.code == 0 and "is finished" in result.out
    assert list((tmp_path / "runs" / "job").glob("2*")) == [folder]
    assert run(*command, "--data.seed", "1").code != 0, "another command starts a run"


def interrupt_test(callback: Figures, trainer: Trainer, task: Any) -> None:
    """Ctrl-C between the test after the training and its plots."""
    if task.test_name == "test":
        raise KeyboardInterrupt


def test_the_command_of_a_finished_run_changes_nothing(run: Run, undisturbed: Path) -> None:
    root = undisturbed.parents[1]
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    shown = run("fit", *LONG, "--run.root", str(root), "--resume", "auto")
    assert shown.code == 0, shown.err
    assert f"{undisturbed} is finished" in shown.out and "test --run" in shown.out
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before


def test_resuming_what_cannot_go_on(refused: Refused, undisturbed: Path) -> None:
    folder = str(undisturbed)
    assert "is finished" in refused("fit", "--resume", folder)
    assert "--model.adapter.rank" in refused("fit", "--resume", folder, "--model.adapter.rank", "7")
    assert "--model.adapter" in refused("fit", "--resume", folder, "--model.adapter", "lora")
    assert "is not a run folder" in refused("fit", "--resume", str(undisturbed / "adapter"))


def test_times_and_the_best_figure_survive_a_resume() -> None:
    rate, later = Throughput(), Throughput()
    rate.images, rate._counted, rate._before = 64, 2.0, 5.0
    later.load_state_dict(rate.state_dict())
    assert (later.per_second, later.seconds) == (32, 5.0)
    first, second = RunCheckpoint(), RunCheckpoint()
    first.best, first.best_step, first.validated = 0.5, 7, {"val/acc": 0.4}
    second.load_state_dict(first.state_dict())
    assert (second.best, second.best_step, second.validated) == (0.5, 7, {"val/acc": 0.4})
