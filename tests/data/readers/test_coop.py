"""CoOp's splits: nine datasets by a JSON file beside their images, tiny but with all classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.catalog import COOP, ROWS, find, with_split
from randlora_pl.data.install import check
from randlora_pl.data.readers import read
from randlora_pl.data.splits import Splits
from randlora_pl.utils.errors import UserError
from tests.data.readers.conftest import Copies
from tests.data.readers.pictures import Writer, label_of
from tests.support.cli import Run
from tests.support.products import in_one_item

EACH = {"train": 6, "val": 5, "test": 1}

SIZES = {
    "caltech101": (100, 8_242),
    "oxfordpets": (37, 7_349),
    "cars": (196, 16_185),
    "flowers102": (102, 8_189),
    "food101": (101, 101_000),
    "sun397": (397, 39_700),
    "dtd": (47, 5_640),
    "eurosat": (10, 27_000),
    "ucf101": (101, 13_320),
}
"""Classes and images of all splits: but for Caltech's without background and second faces, the whole datasets."""

Lists = dict[str, list[list[Any]]]


def write_coop(root: Path, name: str, most: int = 6) -> Lists:
    """Write the split file and the images of a dataset, and return the content of the file."""
    row, write = with_split(find(name), "coop"), Writer()
    lists: Lists = {split: [] for split in EACH}
    for label in sorted(range(row.classes or 0), key=lambda label: label * 7 % 101):
        for split, each in EACH.items():
            for number in range(min(each, most)):
                path = f"class_{label:03d}/{split}_{number}.jpg"
                write(root / row.options["images"] / path, label)
                lists[split].append([path, label, f"Class_{label:03d} of_it"])
    (root / row.options["file"]).write_text(json.dumps(lists))
    return lists


def test_few_shots_have_at_most_four_validation_images_of_a_class(tmp_path: Path) -> None:
    write_coop(tmp_path, name := "eurosat")
    for shots, few in ((1, 1), (4, 4), (5, 4), (None, 5)):
        options = {"dataset": name, "root": str(tmp_path), "split": "coop", "shots": shots, "steps": 1}
        data = ImageData(image_size=16, **options)
        data.setup()
        counts = {split: np.bincount(data.samples(split).labels).tolist() for split in EACH}
        assert counts == {"train": [shots or 6] * 10, "val": [few] * 10, "test": [1] * 10}
        assert data.summary()["split"] == "coop" and data.summary_lines(data.summary())["data"].startswith("eurosat (")
    assert data.templates == ["a centered satellite photo of {}."]
    four = [ImageData(image_size=16, **options | {"shots": 4}, seed=seed) for seed in (0, 1)]
    for data in four:
        data.setup()
    assert set(four[0].samples("val").keys) != set(four[1].samples("val").keys)
    draw, train = tmp_path / "draw.jsonl", four[0].samples("train")
    listed = [{"path": key, "label": label} for key, label in zip(train.keys, train.labels.tolist(), strict=True)]
    draw.write_text("\n".join(map(json.dumps, listed)))
    drawn = ImageData(image_size=16, **options | {"shots": None}, shots_file=str(draw))
    drawn.setup("validate")  # alone: the draw tells the shots
    assert drawn.samples("val").keys == four[0].samples("val").keys


@in_one_item("name", SIZES)
def test_every_split_file_has_a_reader(tmp_path: Path, name: str) -> None:
    lists, row = write_coop(tmp_path, name, most=1), with_split(find(name), "coop")
    assert (row.classes, sum(row.counts.values())) == SIZES[name] and len(row.templates) == 1
    found = Splits(lambda split: read(row, tmp_path, split))
    assert found.has("val") and found.has("test")
    for split in EACH:
        samples = getattr(found, split)
        assert sorted(samples.keys) == sorted(path for path, _, _ in lists[split])
        assert samples.classes == tuple(f"Class {label:03d} of it" for label in range(row.classes or 0))
        for label, number in list(zip(samples.labels.tolist(), samples.rows.tolist(), strict=True))[:20]:
            pixels = samples.images.load(number)
            assert label_of(pixels[pixels.shape[0] // 2, pixels.shape[1] // 2]) in (label, None)
    problems = [problem.what for problem in check(row, tmp_path, 0).problems]
    expected = f"{row.title}: {len(found.train):,} train images, expected {row.counts['train']:,}"
    assert problems[0] == expected and len(problems) == 3


def test_the_usual_ucf101_keeps_its_underscores(copies: Copies) -> None:
    copy = copies("ucf101")
    kept, spaced = (read(row, copy.root, "test") for row in (copy.row, with_split(copy.row, "coop")))
    assert kept and spaced and list(kept.keys) == list(spaced.keys)
    assert kept.classes[0] == "Apply_Eye_Makeup" and spaced.classes[0] == "Apply Eye Makeup"


def test_datasets_without_a_split_file() -> None:
    imagenet, aircraft = with_split(find("imagenet"), "coop"), with_split(find("fgvcaircraft"), "coop")
    assert imagenet.reader == find("imagenet").reader and imagenet.templates == ("a photo of a {}.",)
    assert aircraft.counts == find("fgvcaircraft").counts and len(aircraft.templates) == 1
    assert {row.name for row in ROWS if row.coop is not None and not row.trains_on} == set(COOP)
    assert sum(row.coop is not None for row in ROWS) == 11 + 4  # ImageNet's shifted test sets
    with pytest.raises(
        UserError,
        match=r"mnist does not have this split\..* have it: caltech101, .*, fgvcaircraft",
    ):
        ImageData(dataset="mnist", split="coop")


GOOD: Lists = {
    "train": [["a/0.jpg", 0, "A"], ["a/1.jpg", 1, "B"]],
    "val": [["b/0.jpg", 0, "A"]],
    "test": [["c/0.jpg", 1, "B"]],
}


@in_one_item(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"cos\nsystem\n(S'echo'\ntR.", "cannot be read"),  # a pickle is not run
        (b"{", "cannot be read"),
        (b"[" * 99_999, "nested too deeply"),
        ([], "it does not have the lists train, val, test"),
        (GOOD | {"val": {}}, "it does not have the lists"),
        (GOOD | {"val": [["b/0.jpg", 0]]}, r"val entry 1, \['b/0.jpg', 0\]: it is not of the form"),
        (GOOD | {"val": [["b/0.jpg", 0.0, "A"]]}, "it is not of the form"),
        (GOOD | {"val": [["b/0.jpg", True, "B"]]}, "it is not of the form"),
        (GOOD | {"val": [["b/0.jpg", 0, " "]]}, "it is not of the form"),
        (GOOD | {"val": [["/etc/passwd", 0, "A"]]}, "leaves the folder"),
        (GOOD | {"val": [["b/../../x.jpg", 0, "A"]]}, "leaves the folder"),
        (GOOD | {"val": [["b\\..\\..\\x.jpg", 0, "A"]]}, "leaves the folder"),
        (GOOD | {"val": [["C:x.jpg", 0, "A"]]}, "leaves the folder"),
        (GOOD | {"val": [["b/\0.jpg", 0, "A"]]}, "leaves the folder"),
        (GOOD | {"val": [["", 0, "A"]]}, "leaves the folder"),
        (GOOD | {"val": [["\ud800.jpg", 0, "A"]]}, "surrogates"),
        (GOOD | {"val": [["b/0.jpg", 3, "D"]]}, "its 3 labels should be 0 to 2, but label 2 is missing"),
        (GOOD | {"val": [["b/0.jpg", -1, "D"]]}, "label 0 is missing"),
        (GOOD | {"val": [["b/0.jpg", 0, "B"]]}, "label 0 is called 'A' and 'B'"),
        (GOOD | {"val": [["a/0.jpg", 0, "A"]]}, "'a/0.jpg' is in train and in val"),
        (GOOD, "its files have 2 classes, expected 10|do not exist"),
    ],
)
def test_damaged_split_files_are_refused_in_a_line(tmp_path: Path, content: Any, message: str) -> None:
    row = with_split(find("eurosat"), "coop")
    path = tmp_path / row.options["file"]
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(UserError, match=message) as caught:
        read(row, tmp_path, "val")
    if content is not GOOD:
        text = str(caught.value)
        assert len(text.splitlines()) == 1 and len(text) < 700
        assert str(path) in text and "CoOp/blob/main/DATASETS.md" in text and "prompt_learning_dataset" in text


def test_huge_split_files_are_not_read(tmp_path: Path) -> None:
    row = with_split(find("eurosat"), "coop")
    path = tmp_path / row.options["file"]
    path.parent.mkdir()
    with path.open("wb") as stream:
        stream.truncate(2**27)
    with pytest.raises(UserError, match="134,217,728 bytes, and at most 67,108,864 are read"):
        read(row, tmp_path, "train")


def test_the_command_that_checks(run: Run, refused: Callable[..., str], tmp_path: Path) -> None:
    write_coop(tmp_path / "sets", "eurosat")
    result = run("data", "check", "eurosat", "--root", "sets", "--split", "coop")
    assert result.code == 1 and "EuroSAT (RGB): 60 train images, expected 13,500" in result.out
    everything = run("data", "check", "--all", "--root", "sets", "--split", "coop", "--fast").out
    assert everything.endswith("15 datasets: 0 as expected, 1 off, 14 missing\n")
    assert "mnist does not have this split" in refused("data", "check", "mnist", "--split", "coop")
