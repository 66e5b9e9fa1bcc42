"""Two ranks train a decoder or a classifier to the weights of one process, and count every test sample once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.parallel.jobs import free_port

from .classify import write_reviews, write_scores
from .files import write_e2e
from .small import records

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def alone_and_together(folder: Path, tokenizer: Path, **data: Path) -> dict[str, Any]:
    """What one process saved, which has the same weights and figures as each of two ranks."""
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    sources = [f"{kind}={source}" for kind, source in data.items()]
    command = [sys.executable, "-m", "tests.language.ddp_worker", str(folder), str(tokenizer), *sources]
    for world in (2, 1):
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
        running = [subprocess.Popen(command, cwd=ROOT, env=common | rank) for rank in (ranks if world > 1 else [{}])]
        assert [process.wait(300) for process in running] == [0] * len(running)
    alone, first, second = (torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for kind, one in alone.items():
        for name, value in one["weights"].items():
            assert torch.equal(first[kind]["weights"][name], second[kind]["weights"][name])
            torch.testing.assert_close(first[kind]["weights"][name], value, rtol=1e-3, atol=1e-4)
        assert first[kind]["figures"] == second[kind]["figures"] == pytest.approx(one["figures"], rel=1e-4)
    return {kind: one["figures"] for kind, one in alone.items()}


def answers(folder: Path) -> list[dict[str, Any]]:
    """What was written, by one process and by two ranks alike."""
    one, two = ((folder / world / "answers.jsonl").read_text() for world in "12")
    assert one == two
    return [json.loads(line) for line in one.split("\n")[:-1]]


def test_two_ranks_are_one_process(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": r["prompt"] + " red" * (n % 4), "completion": r["completion"]} for n, r in enumerate(records()[:44])
    ]
    for name, part in (("train", rows[:31]), ("val", rows[31:38]), ("test", rows[38:43])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    alone_and_together(tmp_path, tokenizer, packed=tmp_path, toy=tmp_path)
    assert [row["prompt"] for row in answers(tmp_path)] == [row["prompt"] for row in rows[38:43]]


def test_two_ranks_grade_as_one_process(tokenizer: Path, tmp_path: Path) -> None:
    """Weights and grades of classes and of scores; a mean over ranks of correlations would be another number."""
    data = {"classes": write_reviews(tmp_path / "toy"), "scores": write_scores(tmp_path / "scores")}
    alone_and_together(tmp_path, tokenizer, **data)


def test_scores_of_a_corpus_do_not_depend_on_the_ranks(tokenizer: Path, tmp_path: Path) -> None:
    """Five meanings in batches of two: with two ranks the last batches have padding, which must not be scored."""
    figures = alone_and_together(tmp_path, tokenizer, e2e=write_e2e(tmp_path / "data", more=3))["e2e"]
    assert {"test/BLEU", "test/NIST", "test/ROUGE-L", "test/CIDEr"} <= figures.keys()
    assert figures["test/ROUGE-L"] > 0 and figures["test/NIST"] > 0  # something was written
    assert len(answers(tmp_path)) == 5
