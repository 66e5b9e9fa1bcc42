"""Experiment trackers, and what a finished run leaves for TensorBoard's tabs."""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status

from randlora_pl.run import lightning_cli
from randlora_pl.run.options.mistakes import LOGGERS
from tests.support.cli import SMALL, Run


class Recorder(DummyLogger):
    """A stand-in for MLFlowLogger, whose package is large."""

    made: ClassVar["list[Recorder]"] = []

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.parameters: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.made.append(self)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.metrics |= metrics

    def log_hyperparams(self, params: dict[str, Any]) -> None:  # type: ignore[override]
        self.parameters |= params


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setattr(lightning_cli, "MLFlowLogger", Recorder)
    monkeypatch.setitem(LOGGERS, "mlflow", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Recorder.made


def test_mlflow_gets_hyperparameters_and_metrics(made: list[Recorder], run: Run, tmp_path: Path) -> None:
    assert run("fit", *SMALL, "--run.logger", "mlflow").code == 0
    (recorder,) = made
    folder = next(path for path in (tmp_path / "runs/quickstart").iterdir() if not path.is_symlink())
    results = json.loads((folder / "results.json").read_text())
    assert recorder.parameters["rank"] == 6 and recorder.parameters["learning_rate"] == results["learning_rate"]
    for name in ("test/acc", "zeroshot/acc", "val/loss"):
        assert recorder.metrics[name] == pytest.approx(results[name])
    assert recorder.options["run_name"] == f"quickstart/{folder.name}"


def test_runs_are_kept_together_unless_a_server_is_named(
    made: list[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs/a/1"
    for uri in (None, "http://localhost:1"):
        if uri:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        lightning_cli.make_loggers("mlflow", folder, tmp_path / "runs")
    here, there = (recorder.options for recorder in made)
    assert here["tracking_uri"] == f"sqlite:///{tmp_path / 'runs/mlflow.db'}"
    assert here["artifact_location"] == str(tmp_path / "runs/mlruns")
    assert there["tracking_uri"] == "http://localhost:1" and there["artifact_location"] is None


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow, which is too large for the extra test")
def test_mlflow_itself_keeps_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run("fit", *SMALL, "--run.logger", "mlflow").code == 0
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as store:
        assert ("rank", "6") in store.execute("select key, value from params").fetchall()
        assert "test/acc" in {name for (name,) in store.execute("select key from latest_metrics")}
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]


@pytest.fixture(scope="module")
def board(finished: Path) -> EventAccumulator:
    return EventAccumulator(str(finished / "tensorboard"), size_guidance={"tensors": 0}).Reload()


def content(board: EventAccumulator, tag: str) -> Any:
    return board.SummaryMetadata(tag).plugin_data.content


def test_session_has_the_hyperparameters_of_the_run(board: EventAccumulator, finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    start = metadata.parse_session_start_info_plugin_data(content(board, metadata.SESSION_START_INFO_TAG))
    found = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    for name in ("method", "learning_rate", "trainable_parameters", "seed", "steps", "precision", "task"):
        assert found[name] == results[name], name
    assert found["global_batch"] == results["data/window"] and "batch_size" not in found, "that is a micro-batch"
    assert start.group_name == f"{finished.parent.name}/{finished.name}"
    assert found["rank"] == results["adapter/rank"] and found["dataset"] == results["data/dataset"]
    assert found["adapter"] == f"RandLoRA rank {results['adapter/rank']}" and found["model"] == "tiny, random"
    kept = yaml.safe_load((finished / "tensorboard" / "hparams.yaml").read_text())
    assert {name: type(found[name])(value) for name, value in kept.items()} == found
    end = metadata.parse_session_end_info_plugin_data(content(board, metadata.SESSION_END_INFO_TAG))
    assert end.status == Status.Value("STATUS_SUCCESS")


def test_experiment_names_columns_of_every_run_and_metrics_with_values(board: EventAccumulator, finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    experiment = metadata.parse_experiment_plugin_data(content(board, metadata.EXPERIMENT_TAG))
    columns = {info.name: info.differs for info in experiment.hparam_infos}
    assert "shots" in columns and sum(columns.values()) == 5 and columns["rank"] and columns["trainable_parameters"]
    metrics = [info.name.tag for info in experiment.metric_infos]
    assert metrics[0] == "test/acc" and {"val/acc", "zeroshot/loss", "memory/peak_mb", "train/loss"} <= set(metrics)
    for name in metrics[:-3]:  # three steps leave no point of the other curves
        assert board.Scalars(name)[-1].value == pytest.approx(results[name], rel=1e-6), name


def test_config_and_start_page_are_texts(board: EventAccumulator, finished: Path) -> None:
    texts = {}
    for name in ("config.yaml", "start page"):
        (event,) = board.Tensors(f"{name}/text_summary")
        texts[name] = event.tensor_proto.string_val[0].decode()
    assert texts["config.yaml"] == f"```\n{(finished / 'config.yaml').read_text().strip()}\n```"
    assert "RandLoRA rank" in texts["start page"] and "optimizer steps" in texts["start page"]
