"""A run is killed in each phase of a method or of learned prompts, and the bits are the same."""

import signal
from pathlib import Path

import pytest
import torch

from tests.faults.checks import TINY, assert_whole, run_of, step_of
from tests.faults.child import run
from tests.faults.faults import Fault, Signal
from tests.faults.test_kills import PART, finish, resume

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
