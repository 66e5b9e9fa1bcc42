"""``test --adapter`` on other classes than those of the training."""

import json
from pathlib import Path

import pytest
import torch

from randlora_pl.data.unlabelled import batches, framed
from randlora_pl.tasks import load_task
from tests.support.cli import SMALL, Run

ALL = ["--trainer.limit_test_batches", "1.0", "--data.eval_batch_size", "90"]


def accuracies(run: Run, tmp_path: Path, name: str, *words: str) -> dict[str, object]:
    (adapter,) = (tmp_path / "runs" / name).glob("2*/adapter")
    result = run("test", "--adapter", str(adapter), "--run.name", "other", *words, *ALL[:2])
    assert result.code == 0, result.err
    (folder,) = (tmp_path / "runs/other-test").glob("2*")
    return dict(json.loads((folder / "results.json").read_text()))


@pytest.mark.parametrize("task", ["VisionLanguageTask", "TextHeadTask"])
def test_a_text_head_names_the_new_classes(run: Run, tmp_path: Path, task: str) -> None:
    words = ["--model", task, "--data.classes", "base", "--run.name", "base"]
    assert run("fit", *SMALL, *words).code == 0
    (folder,) = (tmp_path / "runs/base").glob("2*")
    results = json.loads((folder / "results.json").read_text())
    assert (results["data/classes"], results["data/class_half"], results["data/train"]) == (5, "base", 10)
    names = (folder / "test_per_class.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in names[1:]] == ["zero", "one", "two", "three", "four"]
    metadata = json.loads((folder / "adapter/adapter_config.json").read_text())["metadata"]
    assert metadata["classnames"][-1] == "four" and metadata["training"]["class_half"] == "base"
    new = accuracies(run, tmp_path, "base", "--data.classes", "new")
    assert (new["data/classes"], new["data/class_half"], new["data/test"]) == (5, "new", 180)
    assert 0 <= float(str(new["test/acc"])) <= 1


def test_a_trained_head_has_the_rows_of_some_of_its_classes(run: Run, tmp_path: Path) -> None:
    words = ["--model", "LinearHeadTask", "--run.name", "whole", "--trainer.limit_test_batches", "0"]
    assert run("fit", *SMALL, *words).code == 0
    new = accuracies(run, tmp_path, "whole", "--data.classes", "new")
    (adapter,) = (tmp_path / "runs/whole").glob("2*/adapter")
    task = load_task(adapter)
    data = framed({"dataset": "digits", "classes": "new", "num_workers": 0}, task.image_spec, 90)
    data.setup("test")
    with torch.inference_mode():
        right = [
            (task.eval().class_logits(images)[:, 5:].argmax(1) == labels).sum()
            for images, labels in batches(data, data.samples("test"), 90)
        ]
    assert float(str(new["test/acc"])) == pytest.approx(float(sum(right)) / 180)  # type: ignore[arg-type]
    assert run("fit", *SMALL, *words[:2], "--data.classes", "base", "--run.name", "half").code == 0
    (half,) = (tmp_path / "runs/half").glob("2*/adapter")
    refused = run("test", "--adapter", str(half), "--data.classes", "new")
    assert refused.code == 2 and "has a head for 5 other classes" in refused.err


def test_a_resumed_run_keeps_its_classes(run: Run, tmp_path: Path) -> None:
    assert run("fit", *SMALL, "--data.classes", "base", "--run.name", "base").code == 0
    (folder,) = (tmp_path / "runs/base").glob("2*")
    refused = run("fit", "--resume", str(folder), "--data.classes", "new")
    assert refused.code == 2 and "--data.classes is new, in the run base" in refused.err
