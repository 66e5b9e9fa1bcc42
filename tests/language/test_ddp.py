"""Two ranks train a decoder or a classifier to the weights of one process, and count every test sample once."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from .classify import write_reviews, write_scores
from .files import write_e2e
from .small import records

ROOT = Path(__file__).parents[2]


def alone_and_together(kind: str, data: Path, tokenizer: Path, folder: Path) -> list[Any]:
    """What one process saved, and each of two ranks; their trained weights are compared."""
    run_worlds("ddp_worker", folder, kind, data, tokenizer)
    alone, first, second = (torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, value in alone["weights"].items():
        assert torch.equal(first["weights"][name], second["weights"][name])
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4)
    assert first["figures"] == second["figures"] == pytest.approx(alone["figures"], rel=1e-4)
    return [alone, first, second]


def run_worlds(worker: str, folder: Path, *arguments: object) -> None:
    """A worker as two ranks, and as one process alone; they write to a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    command = [sys.executable, "-m", f"tests.language.{worker}", *map(str, arguments), str(folder)]
    for world in (2, 1):
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
        running = [subprocess.Popen(command, cwd=ROOT, env=common | rank) for rank in (ranks if world > 1 else [{}])]
        assert [process.wait(300) for process in running] == [0] * len(running)


@pytest.mark.slow
def test_two_ranks_are_one_process(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": r["prompt"] + " red" * (n % 4), "completion": r["completion"]} for n, r in enumerate(records()[:44])
    ]
    for name, part in (("train", rows[:31]), ("val", rows[31:38]), ("test", rows[38:43])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    alone_and_together("toy", tmp_path, tokenizer, tmp_path)
    one, two = ((tmp_path / world / "answers.jsonl").read_text() for world in "12")
    assert one == two and [json.loads(line)["prompt"] for line in one.split("\n")[:-1]] == [
        row["prompt"] for row in rows[38:43]
    ]


@pytest.mark.slow
def test_two_ranks_grade_as_one_process(tmp_path: Path) -> None:
    """Weights and grades of classes and of scores; a mean over ranks of correlations would be another number."""
    run_worlds("ddp_classifier", tmp_path, write_reviews(tmp_path / "toy"), write_scores(tmp_path / "scores"))
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for kind, one in alone.items():
        for name, value in one["weights"].items():
            assert torch.equal(first[kind]["weights"][name], second[kind]["weights"][name])
            torch.testing.assert_close(first[kind]["weights"][name], value, rtol=1e-3, atol=1e-4)
        assert first[kind]["figures"] == second[kind]["figures"] == pytest.approx(one["figures"], rel=1e-4)


@pytest.mark.slow
def test_scores_of_a_corpus_do_not_depend_on_the_ranks(tokenizer: Path, tmp_path: Path) -> None:
    """Five meanings in batches of two: with two ranks the last batches have padding, which must not be scored."""
    alone, *_ = alone_and_together("e2e", write_e2e(tmp_path / "data", more=3), tokenizer, tmp_path)
    assert {"test/BLEU", "test/NIST", "test/ROUGE-L", "test/CIDEr"} <= alone["figures"].keys()
    assert alone["figures"]["test/ROUGE-L"] > 0 and alone["figures"]["test/NIST"] > 0  # something was written
    one, two = ((tmp_path / world / "answers.jsonl").read_text() for world in "12")
    assert one == two and len(one.split("\n")) == 6
