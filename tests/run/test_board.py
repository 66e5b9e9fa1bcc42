"""What a finished run leaves for TensorBoard's HPARAMS and TEXT tabs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.api_pb2 import Status


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
