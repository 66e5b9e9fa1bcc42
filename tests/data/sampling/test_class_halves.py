"""Base and new classes: the first half of the labels, and the rest from 0."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from randlora_pl.data import ImageData
from randlora_pl.data.readers import Samples
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.splits import few_shot, labels_of, of_half
from randlora_pl.utils.errors import UserError


def samples_of(labels: list[int], classes: int) -> Samples:
    count = len(labels)
    images = ArrayImages(np.zeros((count, 2, 2, 1), dtype=np.uint8), "test")
    keys, names = [f"{number:04d}" for number in range(count)], tuple(f"class {n}" for n in range(classes))
    return Samples(images, np.arange(count), np.asarray(labels, dtype=np.int64), keys, names)


def test_the_base_has_the_odd_class() -> None:
    for count, base in ((37, 19), (101, 51), (47, 24), (100, 50), (2, 1), (1, 1), (0, 0)):
        halves = [labels_of(count, half) for half in ("base", "new")]
        assert [len(half) for half in halves] == [base, count - base]
        assert [*halves[0], *halves[1]] == list(range(count)) == list(labels_of(count, "all"))


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=60))))
def test_the_halves_are_the_whole_with_labels_from_zero(drawn: tuple[int, list[int]]) -> None:
    classes, labels = drawn
    whole = samples_of(labels, classes)
    base, new = (of_half(whole, half) for half in ("base", "new"))
    assert of_half(whole, "all") is whole
    assert base.classes + new.classes == whole.classes and len(base.classes) - len(new.classes) in (0, 1)
    found = {key: name for part in (base, new) for key, name in names_of(part).items()}
    assert found == names_of(whole) and len(base) + len(new) == len(whole)
    for part in (base, new):
        assert not len(part) or 0 <= part.labels.min() <= part.labels.max() < len(part.classes)
        assert list(part.keys) == sorted(part.keys) and part.numbers.tolist() == [
            whole.numbers[whole.keys.index(key)] for key in part.keys
        ]
        chosen = [set(few_shot(part.labels, part.numbers, shots, 3).tolist()) for shots in (1, 2, 4)]
        assert chosen[0] <= chosen[1] <= chosen[2]
        drawn_before = few_shot(whole.labels, whole.numbers, 2, 3)
        same = {whole.keys[n] for n in drawn_before.tolist()} & set(part.keys)
        assert same == {part.keys[n] for n in chosen[1]}  # the draw of a class does not depend on the others


def names_of(samples: Samples) -> dict[str, str]:
    return {key: samples.classes[label] for key, label in zip(samples.keys, samples.labels.tolist(), strict=True)}


def test_names_results_and_the_file_of_shots_follow(tmp_path: Path) -> None:
    file = tmp_path / "shots.json"
    (tmp_path / "names.txt").write_text("".join(f"digit {number}\n" for number in range(10)))
    options = {"dataset": "digits", "shots": 2, "steps": 1, "classnames": str(tmp_path / "names.txt")}
    base = ImageData(**options, classes="base", shots_file=str(file))
    base.setup()
    assert base.classnames == [f"digit {n}" for n in range(5)] and base.num_classes == 5
    facts = base.summary()
    assert (facts["classes"], facts["class_half"], facts["train"]) == (5, "base", 10)
    assert "5 base classes" in base.summary_lines(facts)["data"]
    whole = ImageData(**options)
    whole.setup()
    assert "class_half" not in whole.summary() and "split" not in whole.summary()
    assert set(base.samples("train").keys) < set(whole.samples("train").keys)
    for split in ("val", "test"):  # the same split of the images
        assert set(base.samples(split).keys) < set(whole.samples(split).keys)
    assert list(json.loads(file.read_text())["classes"]) == base.classnames
    again = ImageData(**options, classes="base", shots_file=str(file))
    again.setup()
    assert list(again.samples("train").keys) == list(base.samples("train").keys)
    for name in "abc":
        (tmp_path / "three" / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "three" / name / "it.png")
    with pytest.raises(UserError, match=r"--data\.classes new is 1 of 3 classes"):
        ImageData(dataset="folder", root=tmp_path / "three", classes="new").setup()
    for other in ("new", "all"):
        with pytest.raises(UserError, match=r"classes is 'base', not (None|'new')"):
            ImageData(**options, classes=other, shots_file=str(file)).setup()  # type: ignore[arg-type]
