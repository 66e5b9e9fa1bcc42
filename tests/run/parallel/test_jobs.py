"""Whole fits of two processes: they equal one process, end when one is lost or differs, and go on afterwards."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore

from tests.support.cli import Run

from .jobs import (
    FIT,
    LONG,
    PATIENCE,
    ended,
    free_port,
    outputs,
    spawn_tasks,
    srun,
    torchrun,
    two_agents,
    wait_for_checkpoint,
    worker,
)
from .processes import write_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
STANDALONE = ("--standalone", "--nproc-per-node", "2")


def weights(folder: Path) -> bytes:
    (file,) = folder.glob("runs/*/2*/adapter/adapter.safetensors")
    return file.read_bytes()


def compare(folder: Path, alone: Path) -> None:
    """Same training, in a run folder of its own."""
    (results,), (expected,) = (
        [json.loads(file.read_text()) for file in place.glob("runs/*/2*/results.json")] for place in (folder, alone)
    )
    assert (results["devices"], results["effective_batch"]) == (2, expected["effective_batch"])
    assert results["exchange/bytes_per_step"] == 4 * results["trainable_parameters"]
    assert "exchange/bytes_per_step" not in expected
    assert results["test/loss"] == pytest.approx(expected["test/loss"], rel=1e-3)
    (file,), (other,) = (list(place.glob("runs/*/2*/adapter/adapter.safetensors")) for place in (folder, alone))
    ours, theirs = load_file(file), load_file(other)
    error = sum(float((ours[name] - value).norm() ** 2) for name, value in theirs.items()) ** 0.5
    assert error < 1e-3 * sum(float(value.norm() ** 2) for value in theirs.values()) ** 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("deep")  # as in processes of their own
def test_two_machines_and_two_tasks_end_as_one_process(run: Run, tmp_path: Path) -> None:
    assert run(*FIT, "--data.batch_size", "8").code == 0
    for start in (two_agents, srun):
        folder = tmp_path / start.__name__
        folder.mkdir()
        found = outputs(start([*FIT, "--data.batch_size", "4", "--data.eval_batch_size", "16"], folder))
        assert [code for code, _ in found] == [0, 0], found
        (latest,) = folder.glob("runs/*/latest")
        assert not list(folder.glob("runs/*/.*")) and (latest / "results.json").is_file()
        assert " kB of gradients per step among 2 devices" in found[0][1]
        assert not [line for line in found[1][1].splitlines() if "runs/" in line or line.startswith("randlora-pl")]
        compare(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--data.stps", "3"), ("--data.dataset", "folder", "--data.root", "nowhere")])
def test_a_mistake_is_told_once(tmp_path: Path, words: tuple[str, ...]) -> None:
    for start in (two_agents, srun):
        (code, first), (other, second) = outputs(start([*FIT, *words], tmp_path))
        assert code and other
        told = [line for line in f"{first}\n{second}".splitlines() if line.startswith("randlora-pl: error")]
        assert len(told) == 1 and ("--data.stps" in told[0] or "nowhere" in told[0])
        assert not list(tmp_path.glob("runs/*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run of `LONG` in two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ((code, text),) = outputs([torchrun(LONG, folder, *STANDALONE)])
    assert code == 0, text
    return weights(folder)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_process_ends_the_job_and_the_same_command_goes_on(
    tmp_path: Path, undisturbed: bytes, rank: int
) -> None:
    agent = torchrun(LONG, tmp_path, *STANDALONE)
    with ended(agent):
        folder = wait_for_checkpoint(tmp_path, agent)
        os.kill(worker(agent, rank), signal.SIGKILL)
        started = time.monotonic()
        text = agent.communicate(timeout=60)[0]
    assert agent.returncode == 1 and time.monotonic() - started < 40
    # The other process notices the loss itself, or torchrun ends it first.
    assert f"resume with: randlora-pl fit --resume {folder.relative_to(tmp_path)}" in text
    assert not (folder / "adapter").exists()
    ((code, text),) = outputs([torchrun(LONG, tmp_path, *STANDALONE)])
    assert code == 0 and "resumed after step" in text, text
    assert weights(tmp_path) == undisturbed


@pytest.mark.slow
def test_torchrun_restarts_a_job_to_the_undisturbed_result(tmp_path: Path, undisturbed: bytes) -> None:
    agent = torchrun(LONG, tmp_path, *STANDALONE, "--max-restarts", "1")
    with ended(agent):
        wait_for_checkpoint(tmp_path, agent)
        os.kill(worker(agent, 1), signal.SIGKILL)
        text = agent.communicate(timeout=240)[0]
    assert agent.returncode == 0 and "resumed after step" in text, text
    assert weights(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    tasks = srun([*LONG, "--run.timeout", "5"], tmp_path)
    with ended(*tasks):
        folder = wait_for_checkpoint(tmp_path, *tasks)
        os.kill(tasks[1].pid, signal.SIGSTOP)
        started = time.monotonic()
        text = tasks[0].communicate(timeout=90)[0]
        assert time.monotonic() - started < 40
    assert tasks[0].returncode == 1
    assert f"resume with: randlora-pl fit --resume {folder.relative_to(tmp_path)}" in text


TWO = [*FIT, "--data.shots", "null", "--data.dataset", "folder"]


def roots(folder: Path) -> list[str]:
    """Two copies of one dataset, as words."""
    for name in ("one", "two"):
        write_folder(folder / name)
    return [f"--data.root={folder / name}" for name in ("one", "two")]


def refused_by_both(words: list[list[str]], folder: Path, *messages: str, port: int = 0, within: int = 120) -> None:
    """Two tasks of a job end within so many seconds, with the same reason."""
    started = time.monotonic()
    for code, text in outputs(spawn_tasks(words, folder, port)):
        assert code == 2 and all(each in text for each in messages) and "Traceback" not in text, text
    assert time.monotonic() - started < within


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--model.adapter.rank 7", "--model.adapter.rank is "),
        ("--resume auto", "is at --resume auto, but process 0 is at the run folder"),
    ],
)
def test_another_option_of_one_process_ends_both(tmp_path: Path, more: str, message: str) -> None:
    own, other = roots(tmp_path)
    refused_by_both([[*TWO, own], [*TWO, other, *more.split()]], tmp_path, message)
    assert not list(tmp_path.glob("runs/*/2*"))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_picture_ends_both(tmp_path: Path, split: str) -> None:
    own, other = roots(tmp_path)
    removed = sorted((tmp_path / "two").rglob(f"{split}/**/*.png"))[0]
    removed.unlink()
    refused_by_both([[*TWO, own], [*TWO, other]], tmp_path, f"the {split} samples differ", removed.name)


@pytest.mark.slow
@pytest.mark.usefixtures("deep")  # as in processes of their own
def test_testing_other_weights_ends_both(tmp_path: Path, run: Run) -> None:
    assert run(*FIT, "--run.root", str(tmp_path / "runs")).code == 0
    (own,) = tmp_path.glob("runs/*/2*/adapter")
    other = shutil.copytree(own.parent, tmp_path / "other") / "adapter"
    file = other / "adapter.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: 2 * value for name, value in load_file(file).items()}, file, metadata)
    config = json.loads((other / "adapter_config.json").read_text())
    config.pop("sha256", None)
    (other / "adapter_config.json").write_text(json.dumps(config))
    words = [["test", "--adapter", str(folder), "--trainer.accelerator", "cpu"] for folder in (own, other)]
    refused_by_both(words, tmp_path, "the adapter is '", within=PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("speaks", [False, True])
def test_a_busy_port_ends_both(tmp_path: Path, speaks: bool) -> None:
    """Of a program that is silent, and of another job's store."""
    own, _ = roots(tmp_path)
    port = free_port()
    held = (
        TCPStore("127.0.0.1", port, None, True, wait_for_workers=False) if speaks else socket.create_server(("", port))
    )
    refused_by_both([[*TWO, own]] * 2, tmp_path, f"has port {port}", port=port, within=PATIENCE)
    assert held
