"""Two ranks train to the weights of one process, and evaluate every sample once."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.products import marked
from tests.support.shared import made_once

from .ddp_worker import ACCUMULATE, PROMPTS, RUNS, jobs, main, task_of
from .small import trained, write_pairs

Results = Callable[[str], list[Any]]
ROOT = Path(__file__).parents[2]
SAMPLES = 143
"""Images in the validation split of the digits: uneven over batches and ranks."""
RARE = (
    *("images", "head", "maple + dept", "promptsrc + randlora", "two stages", "cocoop", "projected", "searched"),
    *("unequal", "different", "tables"),
)
"""Jobs of slow tests, in processes of their own."""
ALONE = [name for name in jobs(Path()) if name not in ("resumed", "projected", "statistics")]
"""Jobs that one process does, too."""


def of(*names: str) -> list[Any]:
    """The names as parameters, those in `RARE` marked slow."""
    return marked(zip(names), lambda row: row[0] not in RARE, pytest.mark.slow)


def start(folder: Path, worker: str = "ddp_worker", *arguments: str) -> list[subprocess.Popen[str]]:
    """Two ranks of a process group, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    command = [sys.executable, "-m", "tests.support.quick", f"tests.tasks.{worker}", str(folder), *arguments]
    return [
        subprocess.Popen(
            command, cwd=ROOT, env=common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What a job ended with in one process (this one), if it is in `ALONE`, and in each of two ranks."""

    @cache
    def found(rare: bool) -> list[dict[str, Any]]:
        names = [name for name in jobs(Path()) if (name in RARE) == rare]
        folder = made_once(tmp_path_factory, "ddp_rare" if rare else "ddp", partial(run_all, names=names))
        return [torch.load(folder / f"{key}.pt", weights_only=True) for key in ("1-0", "2-0", "2-1")]

    return lambda name: [each[name] for each in found(name in RARE) if name in each]


def run_all(folder: Path, names: list[str]) -> None:
    write_pairs(folder, images=11, captions=2)
    (folder / "unique").mkdir()
    write_pairs(folder / "unique", images=8, captions=1)
    processes = start(folder, "ddp_worker", *(name for name in names if name != "joint"))
    try:
        main(folder, [name for name in names if name in ALONE])
    finally:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


@pytest.mark.parametrize(("name",), of(*RUNS))
def test_two_ranks_train_to_the_weights_of_one_process(name: str, results: Results) -> None:
    """With accumulation, a shorter last step, and a micro-batch that is all padding on one rank."""
    alone, first, second = results(name)
    assert [result["steps"] for result in (alone, first, second)] == [4, 4, 4]
    assert alone["weights"].keys() == first["weights"].keys()
    for tensor in alone["weights"]:
        assert torch.equal(first["weights"][tensor], second["weights"][tensor]), tensor
    errors = torch.cat([(first["weights"][key] - value).flatten() for key, value in alone["weights"].items()])
    kind, method = RUNS[name]
    start = task_of(kind, method)
    start.set_classes(list("0123456789"), ["{}"])
    start.adapt()
    before = trained(start)
    moved = torch.cat([(value - before[key]).flatten() for key, value in alone["weights"].items()])
    assert errors.norm() < 1e-3 * moved.norm()


@pytest.mark.parametrize(("name",), of(*RUNS))
def test_two_ranks_log_the_loss_and_accuracy_of_all_samples_of_each_step(name: str, results: Results) -> None:
    alone, first, second = (torch.tensor(result["logged"]) for result in results(name))
    assert len(alone) == 4
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name",), of(*PROMPTS))
def test_two_ranks_learn_the_prompts_of_one_process(name: str, results: Results) -> None:
    """Terms of all classes count once, and every trained tensor has a gradient in each step.

    PromptSRC's absolute values have a kink, where rounding could decide the sign of a gradient: no difference is so
    small here. Tip-Adapter's keys are means of the same images in other batches, and its search counts right ones.
    """
    alone, first, second = results(name)
    assert sorted(first["sent"]) == sorted(alone["weights"])
    for tensor, value in alone["weights"].items():
        assert torch.equal(first["weights"][tensor], second["weights"][tensor]), tensor
        moved = (value - alone["start"][tensor]).norm()
        assert moved > 0, tensor
        assert (first["weights"][tensor] - value).norm() < 1e-4 * moved + 1e-6, tensor
    if name == "tip":
        for tensor, value in alone["start"].items():
            assert torch.equal(first["start"][tensor], second["start"][tensor]), tensor
            torch.testing.assert_close(first["start"][tensor], value, rtol=0, atol=1e-6)
        assert alone["start"]["decoupled.factors"].tolist() != [1, 5.5]


@pytest.mark.slow
def test_ranks_compute_the_same_projections(results: Results) -> None:
    first, second = results("projected")
    assert first and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.slow
def test_ranks_search_as_one_process(results: Results) -> None:
    """The gradient of v is averaged by hand; Adam makes steps of one size of it, also where it is small."""
    alone, first, second = results("searched")
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    vectors = {name: value for name, value in alone.items() if name.startswith("v ")}
    moved = torch.cat(list(vectors.values()))
    assert moved.abs().min() > 0
    assert (torch.cat([first[name] for name in vectors]) - moved).norm() < 1e-2 * moved.norm()


@pytest.mark.parametrize(("name",), of("captions", "images", "head"))
def test_every_sample_is_evaluated_once(name: str, results: Results) -> None:
    alone, first, second = results(name)
    assert alone["seen"] == list(range(SAMPLES))
    assert sorted(first["seen"] + second["seen"]) == list(range(SAMPLES))
    assert first["figures"] == second["figures"]
    assert first["figures"] == pytest.approx(alone["figures"], rel=1e-4)


@pytest.mark.parametrize(("name",), of(*RUNS))
def test_only_gradients_of_what_trains_are_exchanged_once_a_step(name: str, results: Results) -> None:
    """Frozen weights, bases, tokens and heads are the same on every rank by construction."""
    _, result, _ = results(name)
    assert sorted(result["sent"]) == sorted(result["weights"])
    size = 4 * sum(value.numel() for value in result["weights"].values())
    assert result["exchange"]["exchange/bytes_per_step"] == size
    # Two micro-batches a step; the last step has its two as well.
    assert result["exchanged"] == [size * (batch // ACCUMULATE) for batch in range(1, 9)]


def test_a_local_loss_is_that_of_each_rank_alone(results: Results) -> None:
    (alone, first, _), (joint,) = results("local"), results("joint")
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-5)
    assert any(not torch.allclose(value, joint[name], atol=1e-4) for name, value in alone.items())


@pytest.mark.slow  # the comparison alone is a test of meetings
def test_ranks_that_start_from_other_weights_are_refused(results: Results) -> None:
    alone, first, second = results("unequal")
    assert alone == ""
    assert "process 1 of 2 has different weights from process 0" in first
    assert first == second


@pytest.mark.slow  # as above
def test_ranks_with_other_images_are_refused(results: Results) -> None:
    alone, first, second = results("different")
    assert alone == ""
    assert first == second and first.startswith("the train samples differ: process 0 has 30, process 1 has 30; number ")


def test_two_ranks_resume_with_the_same_bits(results: Results) -> None:
    for whole, broken in results("resumed"):
        assert all(torch.equal(value, broken[name]) for name, value in whole.items())


def test_running_statistics_are_the_same_in_every_process(results: Results) -> None:
    """Each process sees other images; what they evaluate and save must be one model."""
    first, second = results("statistics")
    assert first["moved"]
    assert first == second


def test_recall_is_that_of_all_pairs(results: Results) -> None:
    alone, first, second = results("pairs")
    assert {"test/recall@1", "test/recall@5", "test/recall@10", "test/acc"} <= alone.keys()
    assert first == second == pytest.approx(alone)


def test_sigmoid_loss_spans_ranks_and_micro_batches(results: Results) -> None:
    """One step on unique captions, with the gradient of open_clip's loss on as many ranks."""
    found = results("sigmoid")
    assert [each["captions"] for each in found] == [8, 4, 4]
    for each in found:
        assert each["moved"].keys() >= {"backbone.logit_scale", "backbone.logit_bias"}
        for name, error in each["errors"].items():
            assert error < 1e-3 * each["moved"][name] + 1e-6, name
        assert each["bias"] == pytest.approx(found[0]["bias"], abs=1e-5) != -10.0


@pytest.mark.slow
def test_two_ranks_write_the_tables_of_one_process(results: Results) -> None:
    alone, first, second = results("tables")
    assert first["texts"] == alone["texts"] and len(alone["texts"]) == 2
    for key in ("test/balanced_accuracy", "test/macro_f1", "test/acc"):
        assert first["found"][key] == second["found"][key] == alone["found"][key]
    assert first["surest"] == second["surest"] == alone["surest"] and len(alone["surest"]) == 3
