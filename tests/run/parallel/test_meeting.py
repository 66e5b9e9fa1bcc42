"""Processes of a job wait for each other at the store until one ends, and compare what they must have in common."""

import re
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from pytest import MonkeyPatch
from torch.nn import Parameter

from randlora_pl.data import ImageData
from randlora_pl.data.base import Part, image_parts, text_part, word_part
from randlora_pl.language.data import TextData
from randlora_pl.language.prompt_sets import Item
from randlora_pl.run import stages
from randlora_pl.run.parallel.launch import Launch, Meeting, check_options, common_options, parting
from randlora_pl.run.parallel.strategy import AdapterDDP, compare_splits
from randlora_pl.tasks import AdaptationModule
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

from .processes import meetings, messages, write_folder


def test_a_process_that_ends_or_does_not_come_is_named() -> None:
    first, second, third = meetings(timeout=0.2)
    assert "processes 1, 2, which did not arrive" in messages([partial(check_options, first, {})])[0]
    first, second, third = meetings()
    waiting = [partial(check_options, meeting, {}) for meeting in (first, third)]
    found = messages([*waiting, partial(second.leave, "there is no folder", lost=False)])
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


@in_one_item(
    ("at", "other", "expected"),
    [
        ("decision", "decision", "process 1 is at --resume auto, but process 0 is at the run folder"),
        ("decision", "options", "process 1 is at the options, but process 0 is at the run folder"),
        ("options", "decision", "process 1 is at --resume auto, but process 0 is at the options"),
    ],
)
def test_processes_at_different_decisions_do_not_wait_for_each_other(at: str, other: str, expected: str) -> None:
    first, second = meetings(2)

    def come(meeting: Meeting, to: str, what: str) -> None:
        try:
            meeting.decided(what, str) if to == "decision" else check_options(meeting, {})
        except UserError as error:
            if meeting is second:
                meeting.leave(str(error), lost=False)
            raise
        check_options(meeting, {})

    found = messages([partial(come, first, at, "the run folder"), partial(come, second, other, "--resume auto")])
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

    messages([partial(runs, meeting) for meeting in meetings(2)])
    expected = "--data.steps is 0 in process 0, 1 in process 1. Give all processes the same options."
    assert ended == [[expected, ""]] * 2


def strategy_of(meeting: Meeting, weights: str = "") -> AdapterDDP:
    strategy = AdapterDDP()
    objective: Any = SimpleNamespace(fingerprint=lambda: weights)
    strategy._meeting, strategy._lightning_module = meeting, AdaptationModule(objective)
    return strategy


def test_other_weights_are_refused_at_every_stage_until_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPStrategy, "model_to_device", lambda self: None)
    for trained in (0, 1):
        own = [strategy_of(meeting, "ab"[meeting.rank == 2]) for meeting in meetings()]
        for strategy in own:
            strategy.exchange["steps"] = trained
        found = messages([strategy.model_to_device for strategy in own])
        assert found == [found[0]] * 3
        assert ("process 2 of 3 has different weights" in found[0]) == (not trained)


def test_modules_of_a_user_are_compared_by_their_whole_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DDPStrategy, "model_to_device", lambda self: None)
    monkeypatch.setattr(DDPStrategy, "optimizer_step", lambda self: None)
    for other in (0.0, 1.0):
        own = [strategy_of(meeting) for meeting in meetings(2)]
        for strategy in own:
            strategy._lightning_module = module = LightningModule()
            module.register_parameter("weight", Parameter(torch.full((2,), other * strategy._meeting.rank)))
        found = messages([strategy.model_to_device for strategy in own])
        assert all(("process 1 of 2 has different weights" in text) == bool(other) for text in found)
        own[0].optimizer_step()  # without running statistics nothing is sent


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
        app: Any = SimpleNamespace(trainer=MagicMock(), task=model, config=config)
        monkeypatch.setattr("randlora_pl.run.stages.launched", lambda: None)
        stages.compare_options(app)  # one process: nothing is read or compared
        app.trainer.strategy = strategy = AdapterDDP()
        stages.compare_options(app)
        own.append((meeting, strategy.options))
    found = messages([partial(check_options, meeting, options) for meeting, options in own])
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
    both = meetings(2)
    first = strategy_of(both[0])
    leave = partial(both[1].leave, "the download failed", lost=False)
    assert messages([partial(first.barrier, "pre_setup"), leave])[0] == "process 1 has ended: the download failed"
    both = meetings(2)
    own = [strategy_of(meeting) for meeting in both]
    assert messages([partial(strategy.barrier, "post_setup") for strategy in own]) == ["", ""]
    assert not any(meeting.exchanges for meeting in both)
    assert messages([partial(strategy.barrier, "run-stage") for strategy in own]) == ["", ""]
    assert all(meeting.exchanges for meeting in both)
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
    assert messages([partial(check_options, second, {})]) == ["process 0 has ended: a picture is missing"]


def parts_of(count: int, other: int | None = None) -> dict[str, Part]:
    table = np.arange(count, dtype=np.int64)[:, None]
    if other is not None:
        table[other] = -1
    return {"train samples": Part(table, lambda index: f"picture {table[index, 0]}")}


def compared(parts: list[dict[str, Part]]) -> list[str]:
    return messages([partial(compare_splits, m, p) for m, p in zip(meetings(len(parts)), parts, strict=True)])


def test_the_first_sample_that_differs_is_named_in_all_processes() -> None:
    assert compared([parts_of(3000)] * 3) == ["", "", ""]
    for other, expected in (
        (parts_of(3000, 2500), "process 0 has 3,000, process 2 has 3,000; number 2,500 is picture 2500 in"),
        (parts_of(2999), "process 0 has 3,000, process 2 has 2,999; number 2,999 is picture 2999 in process"),
        ({}, "process 0 has 3,000, process 2 has 0; number 0 is picture 0 in process 0 and missing in"),
    ):
        found = compared([parts_of(3000), parts_of(3000), other])
        assert expected in found[0] and found == [found[0]] * 3


def test_options_that_differ_are_named_with_both_values_and_places_may_differ(tmp_path: Path) -> None:
    options = {"data.batch_size": 8, "data.root": "/here", "model.adapter.rank": 2, "data.classnames": f"{tmp_path}/"}
    options |= {"model.name": str(tmp_path), "trainer.callbacks": [{"init_args": {"file": str(tmp_path)}}]}
    others = options | {"data.root": "/there", "data.num_workers": 3, "run.logger": "none", "trainer.devices": 2}
    others |= {"model.name": str(tmp_path.parent), "trainer.callbacks": [{"init_args": {"file": "/"}}]}
    others |= {"data.classnames": "names.txt", "data.shots_file": "/missing/here", "data.templates": "/there"}
    for changed, expected in {
        (): "",
        ("data.batch_size", "model.adapter.rank"): "--data.batch_size is 8 in process 0, 5 in process 1; "
        "--model.adapter.rank is 2 in process 0, 5 in process 1",
        ("trainer.strategy",): "--trainer.strategy is None in process 0, 5 in process 1",
        ("trainer.accelerator",): "--trainer.accelerator is None",
        ("trainer.callbacks",): "--trainer.callbacks is [{'init_args': {'file': ",
        ("model.name",): f"--model.name is {str(tmp_path)!r}",
    }.items():
        own = [common_options(options), common_options(others | dict.fromkeys(changed, 5))]
        found = messages([partial(check_options, m, o) for m, o in zip(meetings(2), own, strict=True)])
        assert found[0] == found[1] and found[0].startswith(expected) and bool(found[0]) == bool(expected)


def test_pictures_differ_by_name_class_and_size(tmp_path: Path) -> None:
    digests = []
    for place in ("a", "b", "c"):
        write_folder(tmp_path / place)
        if place == "c":
            file = sorted((tmp_path / place).rglob("*.png"))[0]
            file.write_bytes(file.read_bytes() + b" ")
        data = ImageData(dataset="folder", root=str(tmp_path / place))
        data.setup()
        digests.append({name: part.digest() for name, part in image_parts(data.held, ["x"], []).items()})
    assert digests[0] == digests[1] != digests[2]


def test_another_strategy_waits_for_all_processes() -> None:
    data = ImageData()
    data.trainer = SimpleNamespace(world_size=2, strategy=(strategy := MagicMock(spec=["barrier"])))  # type: ignore[assignment]
    data._compare(parts := MagicMock())
    strategy.barrier.assert_called_once()
    data.trainer = None  # one process
    data._compare(parts)
    parts.assert_not_called()


def test_questions_differ_by_their_answers() -> None:
    both = []
    for answer in ("true", "false"):
        data = TextData()
        data.items = [Item("boolq", "Is it?", answer)]
        both.append(data.parts())
    found = compared(both)
    assert "the test questions differ" in found[0] and "answer='true'" in found[0] and "answer='false'" in found[0]


def test_texts_differ_by_tokens_and_labels() -> None:
    ends, ids = np.array([0, 2, 5]), np.arange(5, dtype=np.int32)
    whole = {"train samples": text_part({"input_ids": ids, "label": np.array([0, 1])}, ends)}
    for tokens, label, shown in ((ids[::-1], 1, "2 tokens (4 3), label 0"), (ids, 2, "3 tokens (2 3 4), label 2")):
        other = text_part({"input_ids": tokens, "label": np.array([0, label])}, ends)
        found = compared([whole, {"train samples": other}])[0]
        assert found.endswith(f"in process 0 and a text of {shown} in process 1. Copy the data again.")
    long = np.zeros(20, dtype=np.int32), np.array([0, 20])
    own, other = (text_part({"input_ids": long[0], "learned": long[0] + n}, long[1]) for n in (0, 1))
    found = compared([{"train samples": own}, {"train samples": other}])[0]
    assert "(0 0 0 0 0 0 0 0 ...) in process 0 and the same with another content in process 1" in found
    assert "Copy the data again, and the files that" in compared([{"templates": word_part([w])} for w in "ab"])[0]
