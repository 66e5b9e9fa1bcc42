"""Processes of a job wait for each other at the store until one of them ends."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from lightning.pytorch.strategies import DDPStrategy
from pytest import MonkeyPatch

from randlora_pl.run import stages
from randlora_pl.run.parallel.launch import Launch, Meeting, parting
from randlora_pl.run.parallel.strategy import AdapterDDP, check_options
from randlora_pl.utils.errors import UserError

from .processes import meetings, messages


def test_a_process_that_ends_or_does_not_come_is_named() -> None:
    first, second, third = meetings(timeout=0.2)
    assert "processes 1, 2, which did not arrive" in messages([lambda: check_options(first, {})])[0]
    first, second, third = meetings()
    waiting = [lambda m=m: check_options(m, {}) for m in (first, third)]  # type: ignore[misc]
    found = messages([*waiting, lambda: second.leave("there is no folder", lost=False)])
    assert found == ["process 1 has ended: there is no folder"] * 2 + [""]


def test_all_that_do_not_come_are_named_after_one_timeout() -> None:
    """The third comes late, which does not give the others more time."""
    some = meetings(5, timeout=0.8)

    def late() -> None:
        time.sleep(0.2)
        check_options(some[2], {})

    def first() -> None:
        with parting():
            check_options(some[0], {})

    with MonkeyPatch.context() as patch:
        patch.setattr("randlora_pl.run.parallel.launch._meetings", [some[0]])
        patch.setattr("randlora_pl.run.parallel.launch.GRACE", 0.3)
        patch.setattr(some[0], "begin", lambda: None)
        started = time.monotonic()
        found = messages([first, lambda: check_options(some[1], {}), late])
    assert time.monotonic() - started < 2
    assert found == ["processes 3, 4, which did not arrive within 0.8 s"] + 2 * [
        "process 0, which has ended: processes 3, 4, which did not arrive within 0.8 s"
    ]


def test_processes_at_different_decisions_do_not_wait_for_each_other() -> None:
    def left(meeting: Meeting, call: Callable[[], object]) -> None:
        try:
            call()
        except UserError as error:
            meeting.leave(str(error), lost=False)
            raise

    for at, other, expected in (
        ("decision", "decision", "process 1 has come to --resume auto, but process 0 to the run folder"),
        ("decision", "options", "process 1 has come to the options, but process 0 to the run folder"),
        ("options", "decision", "process 1 has come to --resume auto, but process 0 to the options"),
    ):
        first, second = meetings(2)
        calls = {
            "decision": lambda m, what: m.decided(what, lambda: ""),
            "options": lambda m, _: check_options(m, {}),
        }

        def one(at: str = at, first: Meeting = first, calls: Any = calls) -> None:
            calls[at](first, "the run folder")
            check_options(first, {})

        def two(other: str = other, second: Meeting = second, calls: Any = calls) -> None:
            left(second, lambda: calls[other](second, "--resume auto"))

        found = messages([one, two])
        assert found[1].startswith(expected) and found[0] == f"process 1 has ended: {found[1]}"


def test_a_run_is_not_refused_for_the_mistake_of_the_run_before() -> None:
    """Of one script, which goes on after the first."""
    ended: list[list[str]] = [[], []]

    def runs(meeting: Meeting) -> None:
        for option in (meeting.rank, 2):
            try:
                check_options(meeting, {"--data.steps": (str(option), option)})
                ended[meeting.rank].append("")
            except UserError as error:
                ended[meeting.rank].append(str(error))
                meeting.leave(str(error), lost=False)
            meeting.begin()

    messages([lambda m=m: runs(m) for m in meetings(2)])  # type: ignore[misc]
    expected = "--data.steps is 0 in process 0, 1 in process 1. Give all processes the same options."
    assert ended == [[expected, ""]] * 2


def strategy_of(meeting: Meeting, weights: str = "") -> AdapterDDP:
    strategy = AdapterDDP()
    strategy._meeting, strategy._lightning_module = meeting, SimpleNamespace(fingerprint=lambda: weights)  # type: ignore[assignment]
    return strategy


def test_other_weights_are_refused_at_every_stage_until_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPStrategy, "model_to_device", lambda self: None)
    for trained in (0, 1):
        own = [strategy_of(meeting, "ab"[meeting.rank == 2]) for meeting in meetings()]
        for strategy in own:
            strategy.exchange.steps = trained
        found = messages([strategy.model_to_device for strategy in own])
        assert found == [found[0]] * 3
        assert ("process 2 of 3 starts from other weights" in found[0]) == (not trained)


def test_another_adapter_is_another_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the user has named a strategy, because the processes of a launcher meet without it."""
    monkeypatch.setattr("randlora_pl.run.stages.resolved", lambda app: {})
    own = []
    for rank, meeting in enumerate(meetings(2)):
        file = tmp_path / f"{rank}.safetensors"
        file.write_bytes(bytes([rank]))
        monkeypatch.setattr("randlora_pl.run.stages.meeting_of", lambda job, timeout, m=meeting: m)
        model = SimpleNamespace(saved=SimpleNamespace(path=file), start=None)
        config = SimpleNamespace(run=SimpleNamespace(timeout=5))
        app: Any = SimpleNamespace(trainer=MagicMock(), model=model, config=config)
        monkeypatch.setattr("randlora_pl.run.stages.launched", lambda: None)
        stages.compare_options(app)  # one process: nothing is read or compared
        app.trainer.strategy = strategy = AdapterDDP()
        stages.compare_options(app)
        own.append((meeting, strategy.options))
    found = messages([lambda m=m, o=o: check_options(m, o) for m, o in own])  # type: ignore[misc]
    assert found[0] == found[1] and re.match(
        "the adapter is 'SHA-256 6e340b9cffb3, /.*0.safetensors' in process 0, 'SHA-256 4bf5122f3445, ", found[0]
    )
    asked = MagicMock()
    monkeypatch.setattr("randlora_pl.run.stages.launched", lambda: Launch(0, 2, 1, 2))
    monkeypatch.setattr("randlora_pl.run.stages.check_options", asked)
    app.trainer.strategy = object()
    stages.compare_options(app)
    asked.assert_called_once_with(meeting, strategy.options)


def test_a_mistake_reaches_the_processes_at_a_barrier_before_the_run() -> None:
    first, second = (strategy_of(meeting) for meeting in meetings(2))
    assert second._meeting is not None
    leave = lambda: second._meeting.leave("the download failed", lost=False)  # type: ignore[union-attr] # noqa: E731
    assert messages([lambda: first.barrier("pre_setup"), leave])[0] == "process 1 has ended: the download failed"
    own = [strategy_of(meeting) for meeting in meetings(2)]
    assert messages([lambda s=s: s.barrier("post_setup") for s in own]) == ["", ""]  # type: ignore[misc]
    assert not own[0]._meeting.exchanges  # type: ignore[union-attr]
    assert messages([lambda s=s: s.barrier("run-stage") for s in own]) == ["", ""]  # type: ignore[misc]
    assert all(strategy._meeting.exchanges for strategy in own)  # type: ignore[union-attr]
    with MonkeyPatch.context() as patch:
        patch.setattr(DDPStrategy, "barrier", usual := MagicMock())
        own[0].barrier("train_dataloader()")
    usual.assert_called_once()


@pytest.mark.parametrize(("job", "exchanges"), [(None, False), (Launch(0, 2, 1, 2), True)])
def test_a_process_waits_for_no_reader_while_tensors_are_exchanged_or_the_others_are_ended(
    job: Launch | None, exchanges: bool
) -> None:
    """Those that wait at the store learn why; Lightning's first process has ended the others."""
    first, second = meetings(2)
    started = time.monotonic()
    with MonkeyPatch.context() as patch, pytest.raises(UserError), parting():
        patch.setattr("randlora_pl.run.parallel.launch._meetings", [first])
        patch.setattr("randlora_pl.run.parallel.launch.launched", lambda: job)
        first.exchanges = exchanges
        raise UserError("a picture is missing")
    assert time.monotonic() - started < 1
    assert messages([lambda: check_options(second, {})]) == ["process 0 has ended: a picture is missing"]
