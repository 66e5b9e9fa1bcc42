"""The split rules on indexes of the real sizes: labels and keys only, no images."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from randlora_pl.data.catalog import PAPER, find
from randlora_pl.data.readers import Samples
from randlora_pl.data.readers.trees import INDICES
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.splits import Splits, subset
from tests.data.catalog.test_registry import TABLE_7
from tests.support.products import in_one_item

OFFICIAL = {
    "cars": (8144, None, 8041),
    "dtd": (3760, None, 1880),
    "eurosat": (21600, 2700, 2700),
    "gtsrb": (26640, None, 12630),
    "mnist": (60000, None, 10000),
    "resisc45": (18900, None, 6300),
    "sun397": (19850, None, 19850),
    "svhn": (73257, None, 26032),
    "cifar10": (50000, None, 10000),
    "cifar100": (50000, None, 10000),
    "imagenet": (1281167, None, 50000),
    "stl10": (5000, None, 8000),
    "food101": (75750, None, 25250),
    "caltech101": (6941, None, 1736),
    "caltech256": (30607, None, None),
    "fgvcaircraft": (3334, 3333, 3333),
    "flowers102": (1020, 1020, 6149),
    "oxfordpets": (3680, None, 3669),
    "cub200": (5994, None, 5794),
    "pascalvoc": (7844, 7818, 14976),
    "country211": (31650, 10550, 21100),
    "ucf101": (7639, 1898, 3783),
}
"""Images of the datasets' own train, validation and test splits; None where there is none."""


def index(size: int, classes: int, split: str) -> Samples:
    """Classes of unequal sizes, as most of the real ones are."""
    weights = np.random.default_rng(classes).uniform(0.5, 1.5, classes)
    counts = np.floor(weights / weights.sum() * (size - classes)).astype(np.int64) + 1
    counts[: size - int(counts.sum())] += 1
    labels = np.repeat(np.arange(classes), counts)
    keys = [f"{label:04d}/{split}_{number:07d}.jpg" for number, label in enumerate(labels.tolist())]
    images = ArrayImages(np.zeros((0, 1, 1, 1), dtype=np.uint8), "none")
    return Samples(images, np.arange(size), labels, keys, tuple(map(str, range(classes))))


@in_one_item("name", [name for name in PAPER if name != "imagenet"])
def test_splits_have_table_7s_counts(name: str) -> None:
    splits_of(name)


@pytest.mark.slow
def test_sixteen_shots_of_imagenets_size() -> None:
    found = splits_of("imagenet").train
    assert np.bincount(subset(found, 16, None, 1, found.classes).labels).tolist() == [16] * 1000


def splits_of(name: str) -> Splits:
    """Return the splits of as many images as a dataset has, in the sizes of Table 7."""
    classes = find(name).classes
    assert classes is not None
    own = {
        split: None if size is None else index(size, classes, split)
        for split, size in zip(("train", "val", "test"), OFFICIAL[name], strict=True)
    }
    found = Splits(own.__getitem__)
    sizes = (len(found.train), len(found.val), len(found.test))
    assert sizes == TABLE_7[name][:3]
    assert len(found.full) == sizes[0] + (0 if found.own_val else sizes[1])
    keys = [set(getattr(found, split).keys) for split in ("train", "val", "test")]
    assert not keys[0] & keys[1] and not keys[0] & keys[2]
    assert np.bincount(found.train.labels, minlength=classes).min() > 0
    return found


@pytest.fixture(scope="module")
def script() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "write_split_indices.py"
    spec = importlib.util.spec_from_file_location("write_split_indices", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shipped(name: str) -> Any:
    return json.loads((INDICES / f"{name}.json").read_text(encoding="utf-8"))


def test_eurosats_index_is_what_the_rule_gives(script: Any) -> None:
    """The file that ships, from the sizes of the classes alone; it never changes."""
    listed = shipped("eurosat")
    assert listed == script.eurosat()
    assert sum(script.EUROSAT.values()) == 27_000
    for name, size in script.EUROSAT.items():
        val, test = set(listed["val"][name]), set(listed["test"][name])
        assert len(val) == len(test) == 270 and not val & test and max(val | test) <= size and min(val | test) >= 1


def test_caltech101s_index_is_what_the_rule_gives(script: Any) -> None:
    """A fifth of the images of each class, rounded up or down."""
    listed = shipped("caltech101")
    assert listed == script.caltech101() and set(listed) == {"test"}
    assert list(script.CALTECH101) == list(find("caltech101").classnames)
    assert sum(script.CALTECH101.values()) == 8_677 and sum(map(len, listed["test"].values())) == 1_736
    for name, size in script.CALTECH101.items():
        numbers = listed["test"][name]
        assert len(set(numbers)) == len(numbers) and set(numbers) <= set(range(1, size + 1))
        assert abs(len(numbers) - size / 5) < 1
