"""SIGKILL at any point of a run: nothing is half-written, nothing that was saved is lost, and the bits are the same."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.faults.checks import FIT, STEPS, TINY, assert_same, assert_whole, finish, resume, run_of, step_of
from tests.faults.child import Command, run
from tests.faults.faults import Cut, Diary, Fault, Signal, hidden

KILLED = (-signal.SIGKILL, -signal.SIGXFSZ)
PART = "checkpoints/.last.ckpt.part"


def examine(place: Path) -> tuple[str, bool]:
    """Looks at what a killed process has left.

    Returns:
        Where it was, and whether a temporary file was there.
    """
    where = (place / "where.txt").read_text().strip()
    if not list(place.glob("runs/*/*")):
        return where, False
    folder = run_of(place)
    assert_whole(folder)
    steps = [0, *map(int, (place / "finished.txt").read_text().split())]
    assert step_of(folder) >= steps[-1], "a finished checkpoint was lost"
    return where, bool(hidden(folder))


def chain(place: Path, faults: Iterable[Fault], undisturbed: Path) -> tuple[Counter[str], int]:
    """Kills a run at each of the faults, resumes it every time, and compares its end.

    Returns:
        How often it was killed where, and how often while a temporary file existed.
    """
    places: Counter[str] = Counter()
    parts = 0
    for fault in faults:
        ended = run(resume(place), place, Diary(), fault)
        assert ended.code in KILLED, (fault, ended)
        where, part = examine(place)
        places[where] += 1
        parts += part
    finish(place, undisturbed)
    return places, parts


def test_kills_in_training_and_in_the_middle_and_at_the_end_of_a_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    faults = [Cut(f"open {PART}", 2, size=900_000), Signal("training", 3), Signal(f"rename {PART}", 2)]
    places, parts = chain(tmp_path, faults, undisturbed)
    assert places == {"training": 1, "checkpoint": 2} and parts == 2


@pytest.mark.parametrize("seed", range(7))
def test_kills_at_random_steps(tmp_path: Path, undisturbed: Path, seed: int) -> None:
    """Six kills each; the counts begin anew in each process, which may be killed before it gets any further."""
    draw = random.Random(seed)
    faults = [
        Signal("training", draw.randint(1, 4)),
        Signal("optimizer", draw.randint(1, 2)),
        Signal("validation", draw.randint(1, 3)),
        Signal(f"rename {PART}", draw.randint(1, 2)),
        Cut(f"open {PART}", draw.randint(1, 2), size=draw.randint(0, 1_800_000)),
        Signal("* *", draw.randint(1, 9)),
    ]
    draw.shuffle(faults)
    places, parts = chain(tmp_path, faults, undisturbed)
    assert places["training"] >= 2 and places["validation"] and places["checkpoint"] >= 2
    assert places.total() == 6 and parts >= 2


def test_kills_while_each_kind_of_file_is_written(tmp_path: Path, undisturbed: Path) -> None:
    """In the order in which a run writes them; of a replaced adapter, each instant around the two renames."""
    faults = [
        Signal("rename .results.json.part", 1),
        Signal("rename .config.yaml.part", 1),
        Signal("rename .config.yaml.part", 2),  # with the values that the model gives
        Signal("rename .shots.json.part*", 1),
        Cut("mkdir .adapter-best.part*", 1, size=300_000),
        Signal("rename .adapter-best.part*", 1),
        Signal(f"rename {PART}", 2),  # the adapter is newer than the checkpoint: it will be replaced
        Signal("rename adapter-best", 1),
        Signal("rename .adapter-best.part*", 1),
        Signal("remove .adapter-best.old*", 1),
        Cut("mkdir .adapter.part*", 1, size=1000),
        Signal("rename .adapter.part*", 1),
        Signal("rename figures/.confusion.png.part", 1),
        Signal("rename .results.json.part", 1),
    ]
    places, parts = chain(tmp_path, faults, undisturbed)
    assert places.keys() >= {"results", "config", "adapter", "checkpoint"}
    assert parts >= 13


def test_kills_at_random_moments(tmp_path: Path, undisturbed: Path) -> None:
    """Twelve by the clock, of as many runs as that takes."""
    draw, kills, number = random.Random(0), 0, 0
    while kills < 12:
        place = tmp_path / str(number)
        place.mkdir(exist_ok=True)
        command = Command(resume(place), place, [Diary()])
        time.sleep(draw.uniform(0.2, 4))
        command.send(signal.SIGKILL)
        if command.wait().code == -signal.SIGKILL:
            kills += 1
            if (place / "where.txt").is_file():
                examine(place)
            continue
        number += 1  # it was faster
        assert_same(run_of(place), undisturbed)
    finish(tmp_path / str(number), undisturbed)


@pytest.mark.parametrize("number", range(1, 2 * STEPS // 4 + 1))
def test_each_validation_that_is_cut_off_is_repeated(tmp_path: Path, undisturbed: Path, number: int) -> None:
    """Also the very last, after which nothing is left to train."""
    places, _ = chain(tmp_path, [Signal("validation", 2 * number)], undisturbed)
    assert places == {"validation": 1}


def test_forked_process_does_what_the_command_does(tmp_path: Path, undisturbed: Path) -> None:
    """So that what holds for the processes of these tests holds for the command in a shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "randlora_pl", *FIT]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(run_of(tmp_path), undisturbed)


UNSAVED = f"open {PART}"
"""Place after a step, before its checkpoint."""
AUTOLORA = (
    *("--model.adapter", "AutoLoRA", "--model.adapter.rank", "3", "--model.adapter.every", "2"),
    *("--model.adapter.dropout", "0.2"),
)
PROMPTS: dict[str, tuple[tuple[str, ...], list[tuple[Fault, int]]]] = {
    "CoOp and LoRA, then a classifier": (  # which trains in steps 6 to 8
        (
            *("--model", "PromptTask", "--model.prompts", "CoOp", "--model.prompts.words", "null"),
            *("--model.prompts.length", "2", "--model.adapter", "LoRA", "--model.adapter.rank", "2"),
            *("--model.adapter.dropout", "0.2", "--model.classifier_steps", "0.4"),
        ),
        [
            (Signal("training", 4), 1),  # in the second half of step 2
            (Signal("training", 8), 4),  # in the last step of the first stage
            (Signal("training", 4), 5),  # with the classifier filled, not saved
            (Signal("training", 6), 7),
        ],
    ),
    "Tip-Adapter-F": (
        (
            *("--model", "PromptTask", "--model.prompts", "Fixed", "--model.adapter", "Frozen"),
            *("--model.head", "TipAdapter", "--model.prompt_learning_rate", "0.1"),
        ),
        [(Signal("training", 1), 0), (Signal("training", 6), 2), (Signal(UNSAVED, 2), 3)],  # first with a cache unsaved
    ),
}
METHODS: dict[str, tuple[tuple[str, ...], list[tuple[Fault, int]]]] = {
    "AdaLoRA": (  # prunes in steps 3 to 6, and keeps its ranks in steps 7 and 8
        (
            *("--model.adapter", "AdaLoRA", "--model.adapter.rank", "3", "--model.adapter.every", "1"),
            *("--model.adapter.warmup", "0.15"),
        ),
        [
            (Signal("training", 4), 1),  # in the warm-up, in the second half of step 2
            (Signal("pruning", 2), 3),  # in step 4
            (Signal(UNSAVED, 2), 4),  # after the pruning of step 5
            (Signal("training", 6), 6),  # with fixed ranks, in step 7
        ],
    ),
    "AutoLoRA": (  # v takes a step after steps 2, 4, 6 and 8
        AUTOLORA,
        [(Signal("training", 4), 1), (Signal("search", 1), 1), (Signal(UNSAVED, 1), 1), (Signal("training", 4), 2)],
    ),
    "AutoLoRA, unrolled": (  # killed with the weights of a central difference, too
        (*AUTOLORA, "--model.adapter.order", "unrolled"),
        [(Signal("training", 4), 1), (Signal("search", 4), 1), (Signal(UNSAVED, 1), 1), (Signal("training", 4), 2)],
    ),
    "Fira": (  # projections in steps 1, 4 and 7
        ("--model.adapter", "Fira", "--model.adapter.rank", "4", "--model.adapter.period", "3"),
        [
            (Signal("training", 6), 2),  # before the second one
            (Signal("projection", 3), 3),  # with two weights updated
            (Signal(UNSAVED, 1), 3),
            (Signal("training", 4), 4),  # after it
        ],
    ),
    **PROMPTS,
}


@pytest.mark.parametrize("name", METHODS)
def test_kills_in_each_phase(tmp_path: Path, name: str) -> None:
    """Each fault with the step of the last checkpoint, which the next process resumes."""
    options, kills = METHODS[name]
    words = [*TINY, "--checkpoint.every_n_steps", "1", *options]
    whole, place = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, place):
        folder.mkdir()
    ended = run(words, whole)
    assert ended.code == 0, ended.err
    state = torch.load(run_of(whole) / "checkpoints" / "last.ckpt", weights_only=True)
    assert ("procedure" in state) == (name not in ("Fira", *PROMPTS))
    for fault, step in kills:
        ended = run(resume(place) if place.joinpath("runs").exists() else words, place, fault)
        assert ended.code == -signal.SIGKILL, (fault, ended)
        assert_whole(run_of(place))
        assert step_of(run_of(place)) == step, fault
    finish(place, run_of(whole))
