"""Published draws: JSON lines whose paths start in a folder of their authors."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from randlora_pl.data import ImageData
from randlora_pl.data.splits import read_draw
from randlora_pl.utils.errors import UserError
from tests.data.conftest import save_image
from tests.data.sampling.test_class_halves import samples_of
from tests.support.products import in_one_item


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
        (line("ant/image_0.png", 1), "has label 1, but here 0 \\('ant'\\). The draw is of another split"),
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
    with pytest.raises(UserError, match=r"--data\.fraction 0\.5 and a published draw exclude each other"):
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
