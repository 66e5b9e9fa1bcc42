"""Published draws, which are JSON lines whose paths start in a folder of their authors, and halves of the classes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from randlora_pl.data import ImageData
from randlora_pl.data.readers import Samples
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.splits import few_shot, labels_of, of_half, read_draw
from randlora_pl.utils.errors import UserError
from tests.data.conftest import save_image
from tests.support.products import in_one_item


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


def line(path: str, label: Any) -> str:
    return json.dumps({"_impath": path, "_label": label, "_domain": 0, "_classname": "any"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes whose images have the same names."""
    for split, each in (("train", 4), ("test", 2)):
        for name in ("ant", "bee", "cat"):
            for number in range(each):
                save_image(tmp_path / "sets" / split / name / f"image_{number}.png")
    return tmp_path / "sets"


def data_of(root: Path, draw: Path, **options: Any) -> ImageData:
    return ImageData(dataset="folder", root=str(root), shots_file=str(draw), image_size=8, num_workers=0, **options)


def test_images_are_found_by_the_ends_of_their_paths(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    draw = root.parent / "draw.jsonl"
    lines = [line("/home/them/DATA/set/train/ant/image_3.png", 0), line("C:\\set\\bee\\image_0.png", 1)]
    lines += [json.dumps({"path": "cat/image_1.png", "label": 2, "name": "cat"}), "", line("x/ant/image_1.png", 0)]
    draw.write_text("\n".join(lines))
    data = data_of(root, draw)
    data.setup("fit")
    held = data.samples("train")
    places = [Path(held.images.name(row)).parts[-2:] for row in held.rows.tolist()]
    assert places == [("ant", "image_1.png"), ("ant", "image_3.png"), ("bee", "image_0.png"), ("cat", "image_1.png")]
    assert held.labels.tolist() == [0, 0, 1, 2]
    assert data.summary()["shots"] == 2 and data.epochs == 10  # few-shot training
    written = data.write_index(root.parent)
    assert written is not None and sorted(map(len, json.loads(written.read_text())["classes"].values())) == [1, 1, 2]
    base = data_of(root, draw, classes="base")
    base.setup("fit")
    assert base.samples("train").labels.tolist() == [0, 0, 1] and base.classnames == ["ant", "bee"]
    with caplog.at_level(logging.WARNING):
        draw.write_text("".join(line(f"ant/image_{number}.png", 0) + "\n" for number in range(4)))
        every = data_of(root, draw)
        every.setup("fit")
    assert len(every.samples("train")) == 4  # one of them is otherwise held out for validation, with seed 0
    assert not set(every.samples("train").keys) & set(every.samples("val").keys)
    assert "has no images of 2 of 3 classes, the first: 'bee'" in caplog.text


@in_one_item(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: '{' is not JSON"),
        ("[1]", "line 1: '\\[1\\]' has no path and label; expected"),
        (line("train/ant/image_0.png", "0"), "has no path and label"),
        (line("train/ant/image_0.png", True), "has no path and label"),
        (line("/", 0), "has no path and label"),
        (line("ant/image_0.png", 0) + "\n" + line("dog/photo.png", 0), "line 2: 'dog/photo.png' is not among the 12"),
        (line("somewhere/image_0.png", 0), "line 1: 'somewhere/image_0.png' fits 3 training images, such as 'ant/"),
        (line("ant/image_0.png", 1), "has label 1, but here 0 \\('ant'\\). The draw belongs to another split"),
    ],
)
def test_draws_that_do_not_fit_are_refused(root: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "draw.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        data_of(root, tmp_path / "draw.jsonl").setup("fit")
    assert str(tmp_path / "draw.jsonl") in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_options_that_contradict_a_draw(root: Path, refused: Callable[..., str]) -> None:
    (root.parent / "draw.jsonl").write_text(line("ant/image_0.png", 0))
    with pytest.raises(UserError, match=r"has 1 images of a class, not --data\.shots 4"):
        data_of(root, root.parent / "draw.jsonl", shots=4).setup("fit")
    with pytest.raises(UserError, match=r"--data\.fraction 0\.5 and a published draw cannot be combined"):
        data_of(root, root.parent / "draw.jsonl", fraction=0.5)
    words = ["--data.dataset", "digits", "--data.shots_file", "not-there.jsonl"]
    assert "The shots file not-there.jsonl does not exist" in refused("fit", "--config", "quickstart", *words)
    with pytest.raises(UserError, match="does not exist"):
        data_of(root, root.parent / "none.jsonl").setup("fit")


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_any_choice_is_read_back(tmp_path_factory: pytest.TempPathFactory, labels: list[int], data: Any) -> None:
    samples = samples_of(labels, 6)
    chosen = data.draw(st.lists(st.integers(0, len(labels) - 1), min_size=1))
    draw = tmp_path_factory.getbasetemp() / "any.jsonl"
    draw.write_text("".join(line(f"/a/b/{samples.keys[n]}", labels[n]) + "\n" for n in chosen))
    found = read_draw(draw, samples)
    assert found.rows.tolist() == sorted(chosen)  # an image that is listed twice counts twice
    assert np.array_equal(found.labels, np.asarray(labels)[sorted(chosen)])
