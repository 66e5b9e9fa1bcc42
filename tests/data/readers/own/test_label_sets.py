"""Several labels of an image: what tables and datasets say, and what splits make of them."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.base import image_parts
from randlora_pl.data.readers import Samples
from randlora_pl.data.readers.label_sets import labelled
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.splits import few_of, hold_out, read_index, write_index
from randlora_pl.data.validate import format_of
from randlora_pl.utils.errors import UserError
from tests.data.readers.conftest import read_split, samples_in
from tests.data.readers.own.test_table import write

CELLS = """path,labels,split
images/0.png,cat;dog,train
images/1.png,,train
images/2.png,"[""dog""]",train
images/3.png,cat|bird|cat|,test
"""


def names(samples: Samples) -> list[list[str]]:
    assert samples.sets is not None
    return [[samples.classes[number] for number in row.nonzero()[0]] for row in samples.sets.toarray()]


def test_cells_of_several_labels(tmp_path: Path) -> None:
    path = write(tmp_path, CELLS.replace(",test", ",train"))
    samples = samples_in("table", path)
    assert samples.classes == ("bird", "cat", "dog")
    assert names(samples) == [["cat", "dog"], [], ["dog"], ["bird", "cat"]]
    assert samples.labels.tolist() == [1, 3, 2, 0]  # the rarest; the first of equals; none of three


def test_lists_of_a_parquet_file(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write(tmp_path, "")
    for kind in (arrow.list_, arrow.large_list):
        listed = arrow.array([["cat", "a;b"], [], None], kind(arrow.string()))
        paths = [f"images/{number}.png" for number in range(3)]
        parquet.write_table(arrow.table({"path": paths, "labels": listed}), tmp_path / "t.parquet")
        assert names(samples_in("table", tmp_path / "t.parquet")) == [["a;b", "cat"], [], []]


def test_a_table_in_the_folder_of_its_images(tmp_path: Path) -> None:
    path = write(tmp_path, CELLS.replace(",test", ",train"), "labels.csv")
    assert format_of(tmp_path) == format_of(path) == "table"
    assert names(samples_in("table", tmp_path)) == names(samples_in("table", path))


def test_lists_of_a_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path, "")
    images = [str(tmp_path / "images" / f"{number}.png") for number in range(3)]
    inner = datasets.ClassLabel(names=["cat", "dog", "yak"])
    columns = {"image": images, "tags": [[1, 0, 1], [], [1]], "number": [1, 2, 3]}
    kinds = {"image": datasets.Image(), "tags": datasets.Sequence(inner), "number": datasets.Value("int64")}
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).save_to_disk(str(tmp_path / "numbers"))
    numbered = samples_in("hf", tmp_path / "numbers")
    assert numbered.classes == ("cat", "dog") and names(numbered) == [["cat", "dog"], [], ["dog"]]
    columns["tags"], kinds["tags"] = [["b", "a"], [], ["b"]], datasets.Sequence(datasets.Value("string"))
    datasets.Dataset.from_dict(columns, datasets.Features(kinds)).save_to_disk(str(tmp_path / "texts"))
    assert names(samples_in("hf", tmp_path / "texts")) == [["a", "b"], [], ["b"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CELLS, r"line 5: the class 'bird' is not in the train split"),
        (CELLS.replace("cat;dog", '"cat, dog"'), r"line 2: 'cat, dog' is not a list of classes\. Write cat;dog, or \["),
        (CELLS.replace('"[""dog""]"', "[dog]"), r"line 4: '\[dog\]' is not a list of classes"),
        ("path,labels\nimages/0.png,\nimages/1.png,;\n", r"no training image has a class\. Write classes into"),
        (
            "path,label\nimages/0.png,a\nimages/1.png,b\nimages/2.png,a; b\n",
            r"line 4: 'a; b' has several labels\. If an image may, name the column 'labels'",
        ),
        (CELLS.replace('""dog""', "'dog'"), r"line 4: .* is not a list of classes\. Write cat;dog, or \[\"cat\", "),
        ("path,tags\nimages/0.png,a;b\n", r"line 1: no column 'label' among path, tags.*, or labels for several"),
        (
            "path,labels\nimages/0.png,a;b\nimages/0.png,c\n",
            r"line 3: .*in line 2, as 'a;b' and 'c'; list all of its classes in one line, in a column 'labels'",
        ),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=message):
        for split in ("train", "test"):
            read_split("table", path, split)


def made(count: int = 200, classes: int = 4) -> Samples:
    chosen = np.random.default_rng(0).random((count, classes)) < [0.6, 0.3, 0.1, 0.02]
    listed = [[str(number) for number in row.nonzero()[0]] for row in chosen]
    images = ArrayImages(np.zeros((count, 2, 2, 1), np.uint8), "made")
    return labelled(images, listed, [f"{n:03d}" for n in range(count)], [*map(str, range(classes))], str)


def test_splits_have_the_rarest_classes_in_proportion_and_keep_images_without_any() -> None:
    samples = made()
    kept, held = hold_out(samples, 40, "test")
    assert sorted([*kept.keys, *held.keys]) == list(samples.keys)
    counts = [np.bincount(part.labels, minlength=5) for part in (samples, held)]
    assert (np.abs(counts[1] - counts[0] / 5) <= 1).all() and counts[1][4] > 0
    for part in (kept, held):  # whatever the order, an image keeps its labels
        rows = [samples.keys.index(key) for key in part.keys]
        assert (part.sets.toarray() == samples.sets.toarray()[rows]).all()
    other = hold_out(samples.subset(np.arange(len(samples))[::-1]), 40, "test")[1]
    assert set(other.keys) == set(held.keys)


def test_shots_are_images_of_each_class(tmp_path: Path) -> None:
    samples = made()
    few = few_of(samples, 3, seed=1)
    assert (few.sets.sum(0) >= 3).all() and len(few) <= 12 and len(set(few.keys)) == len(few)
    for label in range(4):  # as if the class were alone
        own = samples.subset(samples.sets.toarray()[:, label].nonzero()[0])
        alone = labelled(own.images, [["a"]] * len(own), own.keys, ["a"], str)
        assert set(few_of(alone, 3, seed=1).keys) <= set(few.keys)
    write_index(tmp_path / "shots.json", {}, samples, samples.classes)
    again = read_index(tmp_path / "shots.json", {}, samples)
    assert again.keys == list(samples.keys)  # those without a class, too


def test_processes_notice_another_set() -> None:
    samples = made()
    other = samples.subset(np.arange(len(samples)))
    row = int((samples.sets.sum(1) > 1).nonzero()[0][0])
    other.sets.data[other.sets.indptr[row]] = True
    other.sets.indices[other.sets.indptr[row]] = 3 if 3 not in other.sets[[row]].indices else 2
    digests = [image_parts({"train": each}, [], [])["train samples"].digest() for each in (samples, other)]
    assert digests[0] != digests[1]


def test_options_that_need_one_class_are_refused(tmp_path: Path) -> None:
    make = partial(ImageData, dataset="table", root=str(write(tmp_path, CELLS.replace(",test", ",train"))))
    draw = str(tmp_path / "draw.jsonl")
    for options in ({"balance": "weights"}, {"classes": "base"}, {"shots_file": draw}, {"mixup": 0.2}, {"cutmix": 1.0}):
        with pytest.raises(UserError, match=rf"--data\.{next(iter(options))} .*several labels\. Remove it"):
            make(**options).setup("fit")
