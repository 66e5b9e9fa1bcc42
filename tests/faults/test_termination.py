"""What ends a run early: SIGTERM, a lost worker and a spoilt batch. What is saved stays, and the run goes on."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import read_adapter
from tests.faults.checks import FIT, assert_whole, equal, finish, resume, run_of, step_of
from tests.faults.child import PATIENCE, Command, Ended, run
from tests.faults.faults import Fault, KillWorker, Signal, Spoil

TERM, KILL = signal.SIGTERM, signal.SIGKILL
PART = "checkpoints/.last.ckpt.part"


def terminated(ended: Ended, place: Path) -> None:
    """Exit code and line of a run that was asked to end."""
    assert ended.code == 143, ended
    (line,) = ended.err.strip().splitlines()
    assert line == f"randlora-pl: terminated; resume with: randlora-pl fit --resume {run_of(place).relative_to(place)}"


CASES = [
    (Signal("training", 1, (TERM,)), 1),  # the first half of a step
    (Signal("training", 2, (TERM,)), 1),
    (Signal("training", 9, (TERM, TERM)), 5),
    (Signal("optimizer", 5, (TERM,)), 5),
    (Signal("optimizer", 6, (TERM,)), 6),  # a validation follows
    (Signal("training", 16, (TERM,)), 8),  # the last step: it only has to be tested
    (Signal(f"open {PART}", 2, (TERM,)), 2),
    (Signal(f"rename {PART}", 3, (TERM, TERM)), 3),
    (Signal("mkdir .adapter-best.part*", 1, (TERM,)), 2),
]


@pytest.mark.parametrize(("fault", "step"), CASES)
def test_sigterm_saves_the_step(tmp_path: Path, undisturbed: Path, fault: Fault, step: int) -> None:
    terminated(run(FIT, tmp_path, fault), tmp_path)
    assert_whole(run_of(tmp_path))
    assert step_of(run_of(tmp_path)) == step
    finish(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [1, 3, 7])
def test_sigterm_ends_a_validation_which_is_repeated(tmp_path: Path, undisturbed: Path, number: int) -> None:
    terminated(run(FIT, tmp_path, Signal("validation", number, (TERM,))), tmp_path)
    assert step_of(run_of(tmp_path)) == number + 1
    finish(tmp_path, undisturbed)


def test_sigterm_in_the_first_test_ends_the_run(tmp_path: Path) -> None:
    ended = run(FIT, tmp_path, Signal("test", 1, (TERM,)))
    assert ended.code == 143 and "terminated" in ended.err
    assert not (tmp_path / "runs").exists(), "nothing was trained"


def wait_for_checkpoint(place: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not list(place.glob("runs/*/2*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("grace", [0.0, 0.05, 0.3])
def test_sigkill_follows_after_the_grace_period(tmp_path: Path, undisturbed: Path, grace: float) -> None:
    command = Command(FIT, tmp_path)
    wait_for_checkpoint(tmp_path)
    command.send(TERM)
    time.sleep(grace)
    command.send(KILL)
    assert command.wait().code in (-KILL, 143)
    assert_whole(run_of(tmp_path))
    assert step_of(run_of(tmp_path)) >= 2
    finish(tmp_path, undisturbed)


def test_sigterm_to_all_processes_of_a_job(tmp_path: Path) -> None:
    """SLURM sends it to the workers, too; the training still needs them for most of the step."""
    words = [*FIT, "--data.steps", "2", "--trainer.accumulate_grad_batches", "40", "--data.num_workers", "2"]
    words += ["--trainer.val_check_interval", "1.0"]
    command = Command(words, tmp_path, [Signal("training", 2, (signal.SIGSTOP,))])
    deadline = time.monotonic() + PATIENCE
    while not stopped(command):
        assert time.monotonic() < deadline and command.process.is_alive()
        time.sleep(0.01)
    assert command.process.pid is not None
    os.killpg(command.process.pid, TERM)
    os.killpg(command.process.pid, signal.SIGCONT)
    terminated(command.wait(), tmp_path)
    assert_whole(run_of(tmp_path))
    assert step_of(run_of(tmp_path)) == 1


def stopped(command: Command) -> bool:
    """Whether it has got SIGSTOP."""
    return Path(f"/proc/{command.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


WORKERS = ("--data.num_workers", "2")


@pytest.mark.parametrize(("place", "number"), [("training", 9), ("validation", 4)])
def test_lost_worker(tmp_path: Path, undisturbed: Path, place: str, number: int) -> None:
    """Exit code 1, as for any other lost process: nothing that was typed is wrong, and the same again may do."""
    ended = run([*FIT, *WORKERS], tmp_path, KillWorker(place, number))
    folder = run_of(tmp_path)
    assert ended.code == 1, ended
    (line,) = ended.err.strip().splitlines()
    assert re.search(r"process 0 has lost a data loader worker \(.*(Killed|unexpectedly); out of memory\? Try", line)
    assert line.endswith(f"resume with: randlora-pl fit --resume {folder.relative_to(tmp_path)}")
    assert_whole(folder)
    assert step_of(folder) in (4, 6)  # the other worker may have prepared up to four micro-batches more
    finish(tmp_path, undisturbed, "--data.num_workers", "null")


def test_run_stops_at_a_spoilt_batch_and_goes_on_without_it(tmp_path: Path, undisturbed: Path) -> None:
    """The fifth step; the last checkpoint is that of the fourth, after a validation."""
    ended = run(FIT, tmp_path, Spoil("training", 10))
    folder = run_of(tmp_path)
    assert ended.code == 2, ended
    (line,) = ended.err.strip().splitlines()
    assert "the loss is nan at step 5. Lower --model.learning_rate (now 0.001, try 0.0003)" in line
    assert f"The weights before it are in {folder.relative_to(tmp_path)}/adapter (step 4)." in line
    assert_whole(folder)
    assert step_of(folder) == 4
    kept = read_adapter(folder / "adapter")
    assert kept.config["metadata"]["training"]["stopped"] == "the loss was not finite"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert equal(kept.tensors, {name.removeprefix("objective.backbone."): value for name, value in checkpoint.items()})
    assert not json.loads((folder / "results.json").read_text()).get("finished")

    again = run(resume(tmp_path), tmp_path, Spoil("training", 2))
    assert again.code == 2 and "at step 5" in again.err, "where the cause is still there, it stops there again"
    finish(tmp_path, undisturbed)
