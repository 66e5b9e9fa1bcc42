"""``analyze kernel`` on runs of texts."""

import csv
from pathlib import Path

import pytest

from tests.support.cli import Run

from .classify import TYPED, write_reviews
from .small import typed

SHORT = (
    *("--data.steps", "1", "--data.batch_size", "4", "--trainer.limit_val_batches", "1", "--run.logger", "none"),
    *("--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
)


def check(run: Run, tmp_path: Path, *words: str) -> None:
    """Train for a step, and compare with full fine-tuning."""
    trained = run("fit", *words, *SHORT, "--run.name", "one")
    assert trained.code == 0, trained.err
    done = run("analyze", "kernel", "runs/one", "--samples", "4", "--batches", "2", "--output", "out")
    assert done.code == 0, done.err
    (row,) = csv.DictReader((tmp_path / "out" / "kernel.csv").open())
    assert row["method"] == "RandLoRA rank 8" and 0.5 < float(row["alignment"]) < 1 and float(row["spread"]) > 0


def test_a_decoder(run: Run, toy: Path, tokenizer: Path, tmp_path: Path) -> None:
    words = ("--model.max_new_tokens", "2", "--data.dataset", "jsonl", "--data.root", str(toy))
    check(run, tmp_path, *typed(tokenizer), *words, "--data.mask_prompt", "true")


@pytest.mark.slow
def test_a_classifier(run: Run, tmp_path: Path) -> None:
    check(run, tmp_path, *TYPED, "--data.dataset", "csv", "--data.root", str(write_reviews(tmp_path / "data")))
