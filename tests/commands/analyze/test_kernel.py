"""``analyze kernel`` on a finished run of images; `tests/language/test_kernel.py` has texts."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.commands.analyze import kernel
from tests.data.conftest import save_image
from tests.support.cli import SMALL, Run


def test_a_run_is_compared_with_full_fine_tuning(run: Run, finished: Path, tmp_path: Path) -> None:
    done = run("analyze", "kernel", str(finished), "--samples", "4", "--batches", "2", "--output", "out")
    assert done.code == 0, done.err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        f"kernel.{end}" for end in ("csv", "json", "png", "svg")
    }
    (row,) = csv.DictReader((tmp_path / "out" / "kernel.csv").open())
    content = json.loads((tmp_path / "out" / "kernel.json").read_text())
    (own,), values = content["rows"], [float(row[f"batch_{number}"]) for number in (1, 2)]
    trained = json.loads((finished / "results.json").read_text())["trainable_parameters"]
    assert int(row["parameters"]) == own["parameters"] == trained and f"{trained:,}" in done.out
    assert content["samples"] == 4 and values == [own["batch_1"], own["batch_2"]]
    assert all(0.9 < value < 1 for value in values)  # RandLoRA's first update follows full fine-tuning's
    assert float(row["alignment"]) == pytest.approx(sum(values) / 2)
    assert "error at the best scale" in done.out


def test_no_sample_is_in_the_batches_twice(run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def align(model: Any, loss: Any, samples: Any, *sizes: int) -> tuple[int, list[float]]:
        seen.extend(int(each["index"]) for each in samples)
        return 1, [0.5] * 4

    monkeypatch.setattr("randlora_pl.lab.analysis.kernel.align", align)
    assert run("analyze", "kernel", str(finished), "--samples", "5").code == 0
    assert sorted(seen) == [*range(20)]
    seen.clear()
    for name, count in {"train/a": 2, "train/b": 10, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1}.items():
        for number in range(count):
            save_image(Path("own") / name / f"{number}.png", number)
    more = ("--data.dataset", "folder", "--data.root", "own", "--data.shots", "null", "--data.balance", "sampler")
    assert run("fit", *SMALL, *more, "--run.name", "own").code == 0
    assert run("analyze", "kernel", "runs/own", "--samples", "3").code == 0
    assert sorted(seen) == [*range(12)]


def test_what_is_refused(run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_room", lambda device: 2 * 10**6)
    for words, message in (
        ((str(finished / "adapter"),), "is not a run folder: it has no config.yaml"),
        ((str(finished), "--samples", "1"), "--samples is 1: give"),
        ((str(finished), "--samples", "6"), "4 batches of 6 are more than the 20 training samples. Give fewer."),
        ((str(finished), "--samples", "5"), "give at most --samples 3"),
    ):
        refused = run("analyze", "kernel", *words)
        assert refused.code == 2 and message in refused.err and refused.err.count("\n") <= 2, refused.err
    assert not (tmp_path / "runs").exists()
