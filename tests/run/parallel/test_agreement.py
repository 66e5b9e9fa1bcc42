"""What the processes of a job must have in common, and how a difference is named."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

from randlora_pl.data import ImageData
from randlora_pl.data.base import Part, image_parts, text_part, word_part
from randlora_pl.language.data import TextData
from randlora_pl.language.prompt_sets import Item
from randlora_pl.run.parallel.strategy import check_options, common_options, compare_splits

from .processes import meetings, messages, write_folder


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
        pairs = zip(meetings(2), own, strict=True)
        found = messages([lambda m=m, o=o: check_options(m, o) for m, o in pairs])  # type: ignore[misc]
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
