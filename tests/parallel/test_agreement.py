"""Processes that train must have the same options and samples."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image
from torch.distributed import HashStore, TCPStore

from randlora_pl.data import ImageData
from randlora_pl.data.parts import Part, image_parts, text_part
from randlora_pl.parallel.agreement import common_options, compare_options, compare_splits
from randlora_pl.parallel.meeting import Meeting
from randlora_pl.utils.errors import LostProcessError, UserError
from tests.support.cli import SMALL

from .jobs import free_port, outputs, spawn_tasks


def write_folder(folder: Path) -> None:
    """Twelve pictures of two classes."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 40), (9 * number, 0, 0)).save(folder / split / name / f"{split}{number}.png")


def meetings(world: int = 3, timeout: float = 5) -> list[Meeting]:
    store = HashStore()
    return [Meeting(store, rank, world, timeout) for rank in range(world)]


def messages(calls: list[Callable[[], None]]) -> list[str]:
    """Call all at once, each as a process; return their errors."""
    found = [""] * len(calls)

    def one(rank: int) -> None:
        try:
            calls[rank]()
        except (UserError, LostProcessError) as error:
            found[rank] = str(error)

    threads = [Thread(target=one, args=(rank,)) for rank in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def parts_of(count: int, other: int | None = None) -> dict[str, Part]:
    table = np.arange(count, dtype=np.int64)[:, None]
    if other is not None:
        table[other] = -1
    return {"train samples": Part(table, lambda index: f"picture {table[index, 0]}")}


def compared(parts: list[dict[str, Part]]) -> list[str]:
    pairs = zip(meetings(len(parts)), parts, strict=True)
    return messages([lambda m=m, p=p: compare_splits(m, p) for m, p in pairs])  # type: ignore[misc]


def test_the_first_sample_that_differs_is_named_in_all_processes() -> None:
    assert compared([parts_of(3000)] * 3) == ["", "", ""]
    for other, expected in {
        "changed": (parts_of(3000, 2500), "process 0 has 3,000, process 2 has 3,000; number 2,500 is picture 2500 in"),
        "missing": (
            parts_of(2999),
            "process 0 has 3,000, process 2 has 2,999; number 2,999 is picture 2999 in process",
        ),
        "without": ({}, "process 0 has 3,000, process 2 has 0; number 0 is picture 0 in process 0 and missing in"),
    }.values():
        found = compared([parts_of(3000), parts_of(3000), other])
        assert expected in found[0] and found == [found[0]] * 3


def test_options_that_differ_are_named_with_both_values_and_places_may_differ(tmp_path: Path) -> None:
    options = {"data.batch_size": 8, "data.root": "/here", "model.adapter.rank": 2, "data.classnames": f"{tmp_path}/"}
    others = options | {"data.root": "/there", "data.num_workers": 3, "run.logger": "none", "trainer.devices": 2}
    others |= {"data.classnames": str(tmp_path.parent), "trainer.callbacks": []}
    for changed, expected in {
        (): "",
        ("data.batch_size", "model.adapter.rank"): "--data.batch_size is 8 in process 0",
    }.items():
        own = [common_options(options), common_options(others | dict.fromkeys(changed, 5))]
        pairs = zip(meetings(2), own, strict=True)
        found = messages([lambda m=m, o=o: compare_options(m, o) for m, o in pairs])  # type: ignore[misc]
        assert found[0] == found[1] and found[0].startswith(expected) and bool(found[0]) == bool(expected)
        if expected:
            assert "5 in process 1; --model.adapter.rank is 2 in process 0, 5 in process 1" in found[0]


def test_a_process_that_ends_or_does_not_come_is_named() -> None:
    first, second, third = meetings(timeout=0.2)
    assert "process 1, which did not arrive" in messages([lambda: compare_options(first, {})])[0]
    first, second, third = meetings()
    waiting = [lambda m=m: compare_options(m, {}) for m in (first, third)]  # type: ignore[misc]
    found = messages([*waiting, lambda: second.leave("there is no folder", lost=False)])
    assert found == ["process 1 has ended: there is no folder"] * 2 + [""]


def test_pictures_differ_by_name_class_and_size(tmp_path: Path) -> None:
    digests = []
    for place in ("a", "b", "c"):
        write_folder(tmp_path / place)
        if place == "c":
            file = sorted((tmp_path / place).rglob("*.png"))[0]
            file.write_bytes(file.read_bytes() + b" ")
        data = ImageData(dataset="folder", root=str(tmp_path / place))
        data.setup()
        digests.append({name: part.digest() for name, part in image_parts(data.splits.held, ["x"], []).items()})
    assert digests[0] == digests[1] != digests[2]


def test_another_strategy_waits_for_all_processes() -> None:
    data = ImageData()
    data.trainer = SimpleNamespace(world_size=2, strategy=(strategy := MagicMock(spec=["barrier"])))  # type: ignore[assignment]
    data._compare({})
    strategy.barrier.assert_called_once()


def test_texts_differ_by_tokens_and_labels() -> None:
    ends, ids = np.array([0, 2, 5]), np.arange(5, dtype=np.int32)
    whole = text_part({"input_ids": ids, "label": np.array([0, 1])}, ends)
    for other in ({"input_ids": ids[::-1], "label": np.array([0, 1])}, {"input_ids": ids, "label": np.array([0, 2])}):
        assert text_part(other, ends).digest() != whole.digest()
    assert whole.describe(1) == "a text of 3 tokens"


FIT = ["fit", *SMALL, "--run.logger", "none", "--data.shots", "null"]
OPTIONS = {
    "--data.eval_batch_size": "300", "--data.batch_size": "4", "--model.learning_rate": "0.01", "--data.steps": "5",
    "--model.adapter.rank": "7",
}  # fmt: skip


def roots(folder: Path) -> list[str]:
    """Two copies of one dataset."""
    for name in ("one", "two"):
        write_folder(folder / name)
    return [str(folder / name) for name in ("one", "two")]


def both(folder: Path, more: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of two tasks of a job with own words, which must end soon."""
    started = time.monotonic()
    found = outputs(spawn_tasks([[*FIT, "--data.dataset", "folder", *words] for words in more], folder))
    assert time.monotonic() - started < 120
    return found


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_another_option_ends_all_processes(tmp_path: Path, option: str) -> None:
    own, other = ([f"--data.root={root}"] for root in roots(tmp_path))
    for code, text in both(tmp_path, [own, [*other, option, OPTIONS[option]]]):
        assert code == 2 and f"{option} is " in text and "Traceback" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_picture_ends_all_processes(tmp_path: Path, split: str) -> None:
    own, other = roots(tmp_path)
    removed = sorted((tmp_path / "two").rglob(f"{split}/**/*.png"))[0]
    removed.unlink()
    for code, text in both(tmp_path, [[f"--data.root={own}"], [f"--data.root={other}"]]):
        assert code == 2 and f"the {split} samples differ" in text and removed.name in text, text
        assert "Traceback" not in text


@pytest.mark.slow
def test_other_places_and_workers_are_no_difference(tmp_path: Path) -> None:
    own, other = roots(tmp_path)
    words = [[f"--data.root={own}"], [f"--data.root={other}", "--data.num_workers", "1"]]
    assert [code for code, _ in both(tmp_path, words)] == [0, 0]


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all(tmp_path: Path) -> None:
    own, _ = roots(tmp_path)
    for code, text in both(tmp_path, [[f"--data.root={own}"], ["--data.root=nowhere"]]):
        assert code == 2 and "nowhere" in text and "Traceback" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("speaks", [False, True])
def test_a_busy_port_ends_all(tmp_path: Path, speaks: bool) -> None:
    """Of a program that is silent, and of another job's store."""
    own, _ = roots(tmp_path)
    port = free_port()
    held = (
        TCPStore("127.0.0.1", port, None, True, wait_for_workers=False) if speaks else socket.create_server(("", port))
    )
    words = [*FIT, "--data.dataset", "folder", f"--data.root={own}"]
    for code, text in outputs(spawn_tasks([words, words], tmp_path, port)):
        assert code == 2 and f"has port {port}" in text and "Traceback" not in text, text
    assert held
