"""Several labels of an image: what tables and datasets say, and what splits make of them."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from randlora_pl.data import ImageData
from randlora_pl.data.base import image_parts
from randlora_pl.data.readers import Samples
from randlora_pl.data.readers.label_sets import labelled
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.splits import few_of, hold_out, read_index, write_index
from randlora_pl.data.transforms import Augment, finish
from randlora_pl.data.validate import format_of
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.image_spec import ImageSpec
from tests.data.readers.conftest import read_split, samples_in
from tests.data.readers.own.test_table import write

CELLS = """path,labels,split
images/0.png,cat;dog,train
images/1.png,,train
images/2.png,"[""dog""]",train
images/3.png,"{""choices"": [""cat"", ""bird""]}",test
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


def test_a_column_for_each_class(tmp_path: Path) -> None:
    text = "file_name,dog,cat,yak\nimages/0.png,1,True,0\nimages/1.png,0.0,false,0\nimages/2.png,0,1,0\n"
    samples = samples_in("table", write(tmp_path, text))
    assert samples.classes == ("dog", "cat", "yak")  # in the order of the columns, also without images
    assert names(samples) == [["dog", "cat"], [], ["cat"]]


def test_a_table_in_the_folder_of_its_images(tmp_path: Path) -> None:
    path = write(tmp_path, CELLS.replace(",test", ",train"), "labels.csv")
    assert format_of(tmp_path) == format_of(path) == "table"
    assert names(samples_in("table", tmp_path)) == names(samples_in("table", path))


def test_lists_of_a_hugging_face_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write(tmp_path, "")
    images = [str(tmp_path / "images" / f"{number}.png") for number in range(3)]
    inner = datasets.ClassLabel(names=["cat", "dog", "yak"])
    columns = {"image": images, "tags": [[1, 0], [], [1]], "number": [1, 2, 3]}
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
        (CELLS.replace("cat;dog", "cat|dog|cat"), r"line 2: the class 'cat' is listed twice\. Remove one"),
        (CELLS.replace("cat;dog", "cat;;dog"), r"line 2: 'cat;;dog' has a class without a name\. Remove the separator"),
        (CELLS.replace('""dog""', "'dog'"), r"line 4: .* is not a list of classes\. Write cat;dog, or \[\"cat\", "),
        ("path,cat,dog\nimages/0.png,1,0\nimages/1.png,1,2\n", r"line 3: the column 'dog' has '2', expected 0 or 1"),
        ("path,cat,\nimages/0.png,1,0\n", r"line 1: .*each other column is a class.*Name the columns, .*: path, cat"),
        ("path,kind,size\nimages/0.png,cat,3\n", r"line 1: no column 'label' among path, kind, size"),
        (
            "path,labels\nimages/0.png,a;b\nimages/0.png,c\n",
            r"line 3: .*in line 2, as .*list all of its classes in one",
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


def test_mixup_blends_sets_and_keeps_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(4, 3, generator=generator) < 0.5).float()
    pixels, weight = torch.rand(4, 3, 8, 8, generator=generator), torch.full((4,), 0.25)
    mix = Augment(mixup=1.0).mixing(torch.arange(4), weight, seed=0, classes=3)
    batch = {"image": pixels, "label": torch.zeros(4, dtype=torch.long), "weight": weight, "target": target} | mix
    blended = finish(batch, ImageSpec(size=8, mean=(0, 0, 0), std=(1, 1, 1)))
    share = ((blended["image"] - pixels.roll(1, 0)) / (pixels - pixels.roll(1, 0))).median()
    torch.testing.assert_close(blended["target"], share * target + (1 - share) * target.roll(1, 0), atol=1e-4, rtol=0)
    torch.testing.assert_close(blended["weight"], weight)


def test_options_that_need_one_class_are_refused(tmp_path: Path) -> None:
    make = partial(ImageData, dataset="table", root=str(write(tmp_path, CELLS.replace(",test", ",train"))))
    for options in ({"balance": "weights"}, {"classes": "base"}, {"shots_file": str(tmp_path / "draw.jsonl")}):
        with pytest.raises(UserError, match=rf"--data\.{next(iter(options))} .*several labels\. Remove it"):
            make(**options).setup("fit")
