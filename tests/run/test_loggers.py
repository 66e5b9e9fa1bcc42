"""Experiment trackers beside TensorBoard."""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from lightning.pytorch.loggers import Logger

from randlora_pl.run import lightning_cli
from randlora_pl.run.options.choices import LOGGERS
from tests.support.cli import SMALL, Run


class Recorder(Logger):
    """A stand-in for MLFlowLogger, whose package is large."""

    made: ClassVar["list[Recorder]"] = []

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.title, self.options = name, options
        self.parameters: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}
        self.made.append(self)

    @property
    def name(self) -> str:
        return self.title

    @property
    def version(self) -> str:
        return "1"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
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
