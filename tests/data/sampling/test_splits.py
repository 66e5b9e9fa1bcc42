import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randlora_pl.data import splits
from randlora_pl.data.catalog import find
from randlora_pl.data.readers import Samples, in_key_order, read
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.splits import Splits, _quotas, few_shot, hold_out, stratified
from randlora_pl.utils.errors import UserError

labels_of = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(lambda found: np.asarray(found, dtype=np.int64))


def samples_of(labels: np.ndarray, keys: list[str] | None = None, groups: np.ndarray | None = None) -> Samples:
    images = ArrayImages(np.zeros((len(labels), 2, 2, 1), dtype=np.uint8), "test")
    keys = keys or [f"{number:04d}" for number in range(len(labels))]
    numbers = np.arange(len(labels), dtype=np.int64)
    classes = tuple("abcdef")
    return Samples(images, numbers, np.asarray(labels, dtype=np.int64), keys, classes, groups)


@given(labels_of, st.floats(0, 1), st.integers(0, 1000))
def test_stratified_is_exact_and_proportional(labels: np.ndarray, share: float, seed: int) -> None:
    total = int(share * len(labels))
    chosen = stratified(labels, np.arange(len(labels)), total, seed, "name")
    assert len(chosen) == len(set(chosen.tolist())) == total
    counts = np.bincount(labels)
    found = np.bincount(labels[chosen], minlength=len(counts))
    assert np.all(np.abs(found - counts * total / len(labels)) < 1) and np.all(found <= counts)


@given(labels_of, st.integers(1, 20), st.integers(0, 1000))
def test_few_shot_is_exact_and_nested(labels: np.ndarray, shots: int, seed: int) -> None:
    chosen = few_shot(labels, np.arange(len(labels)), shots, seed)
    counts = np.bincount(labels)
    assert np.array_equal(np.bincount(labels[chosen], minlength=len(counts)), np.minimum(counts, shots))
    assert set(chosen.tolist()) <= set(few_shot(labels, np.arange(len(labels)), shots + 1, seed).tolist())


def test_seeds_choose_differently_and_evenly() -> None:
    labels = np.repeat(np.arange(3), 40)
    drawn = np.zeros(120)
    for seed in range(400):
        drawn[few_shot(labels, np.arange(len(labels)), 10, seed)] += 1
    assert abs(drawn - 100).max() < 40  # mean 100, standard deviation 8.7


@settings(max_examples=30)
@given(labels_of, st.randoms())
def test_choice_ignores_the_order_of_files(labels: np.ndarray, random: object) -> None:
    keys = [f"k{number * 7919 % 1000:03d}" for number in range(len(labels))]
    shuffled = list(range(len(keys)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    images = ArrayImages(np.zeros((len(labels), 1, 1, 1), dtype=np.uint8), "test")
    here = in_key_order(images, labels, keys, "abcdef")
    there = in_key_order(images, labels[shuffled], [keys[place] for place in shuffled], "abcdef")
    for first, second in ((few_shot(here.labels, here.numbers, 2, 0), few_shot(there.labels, there.numbers, 2, 0)),):
        assert here.subset(first).keys == there.subset(second).keys
    assert hold_out(here, len(labels) // 3, "val")[1].keys == hold_out(there, len(labels) // 3, "val")[1].keys


def test_one_more_file_moves_hardly_any_other() -> None:
    def split(count: int) -> list[set[str]]:
        keys = [f"{label}/{number:03d}.png" for label in range(4) for number in range(100)]
        keys.insert(0, "0/000-new.png")
        keys = keys[1:] if count == 400 else keys
        images = ArrayImages(np.zeros((len(keys), 1, 1, 1), dtype=np.uint8), "test")
        samples = in_key_order(images, [int(key[0]) for key in keys], keys, "abcd")
        found = Splits(lambda name: samples if name == "train" else None)
        return [set(part.keys) for part in (found.train, found.val, found.test)]

    for before, after in zip(split(400), split(401), strict=True):
        assert len(before ^ after) <= 4


def test_same_key_twice_is_refused() -> None:
    images = ArrayImages(np.zeros((2, 1, 1, 1), dtype=np.uint8), "test")
    with pytest.raises(UserError, match="'a'"):
        in_key_order(images, [0, 1], ["a", "a"], "xy")


def test_quotas_break_ties_by_the_given_order() -> None:
    counts = np.asarray([3, 3, 3])
    assert _quotas(counts, 4, np.asarray([2, 0, 1])).tolist() == [1, 1, 2]
    assert _quotas(np.zeros(3, dtype=np.int64), 0, np.arange(3)).tolist() == [0, 0, 0]


def test_no_class_loses_its_only_image() -> None:
    kept, aside = hold_out(samples_of(np.arange(6)), 2, "test")
    assert (len(kept), len(aside)) == (6, 0)
    kept, aside = hold_out(samples_of(np.asarray([0, 0, 1, 1, 2])), 2, "test")
    assert set(kept.labels.tolist()) == {0, 1, 2} and len(aside) == 2


@pytest.mark.parametrize("groups", [None, np.zeros(1, dtype=np.int64)])
def test_the_only_image_of_all_is_kept(groups: np.ndarray | None) -> None:
    kept, aside = hold_out(samples_of(np.zeros(1), groups=groups), 1, "test")
    assert (len(kept), len(aside)) == (1, 0)


def test_groups_stay_together() -> None:
    groups = np.repeat(np.arange(20), 3)
    kept, aside = hold_out(samples_of(np.zeros(60), groups=groups), 5, "test")
    assert len(aside) == 15 and not set(kept.groups) & set(aside.groups)


@pytest.mark.parametrize(
    ("size", "val"),
    [(60_000, 5_000), (8_144, 814), (3_760, 376), (26_640, 2_664), (19_850, 1_985), (9, 0)],
)
def test_validation_counts_of_the_paper(size: int, val: int) -> None:
    labels = np.arange(size, dtype=np.int64) % min(size // 4, 43)
    found = Splits(lambda split: None if split == "val" else samples_of(labels))
    assert (len(found.train), len(found.val), len(found.full)) == (size - val, val, size)


def test_a_set_of_train_images_alone_gives_a_fifth_for_the_test() -> None:
    caltech256 = samples_of(np.arange(30_607, dtype=np.int64) % 6)
    found = Splits({"train": caltech256, "val": None, "test": None}.get)
    assert (len(found.train), len(found.val), len(found.test)) == (22_037, 2_448, 6_122)


def test_digits_split_is_fixed_for_ever() -> None:
    row = find("digits")
    found = Splits(lambda split: read(row, Path(), split))
    assert {name: len(getattr(found, name)) for name in ("train", "val", "test")} == row.counts
    counts = np.bincount(found.test.labels)
    assert counts.min() >= 34 and counts.max() <= 37
    keys = [set(getattr(found, name).keys) for name in ("train", "val", "test")]
    assert len(set.union(*keys)) == 1797 == sum(map(len, keys))
    digest = hashlib.sha256(json.dumps([sorted(part) for part in keys]).encode()).hexdigest()
    assert digest[:16] == "04a2415dc8b600a9"


def test_own_splits_are_taken_as_they_are() -> None:
    made = {name: samples_of(np.zeros(size)) for name, size in (("train", 30), ("val", 5), ("test", 7))}
    found = Splits(made.get)
    assert (found.train, found.val, found.test) == (made["train"], made["val"], made["test"])
    with pytest.raises(UserError, match="train"):
        _ = Splits({}.get).train


def test_fraction_and_shots(caplog: pytest.LogCaptureFixture) -> None:
    samples = samples_of(np.repeat(np.arange(3), (20, 20, 5)))
    half = splits.subset(samples, None, 0.5, 0, "abc")
    assert np.bincount(half.labels).tolist() == [10, 10, 2]
    assert len(splits.subset(samples, None, 0.001, 0, "abc")) == 1
    assert splits.subset(samples, None, None, 0, "abc") is samples
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        few = splits.subset(samples, 8, None, 0, "abc")
    assert np.bincount(few.labels).tolist() == [8, 8, 5]
    assert caplog.messages == ["1 of 3 classes have fewer than 8 images ('c' has 5): all of their images are used"]


def test_index_file(tmp_path: Path) -> None:
    samples = samples_of(np.arange(12) % 3)
    key = {"dataset": "digits", "shots": 2, "fraction": None, "train_split": "train", "seed": 0, "version": 1}
    few = splits.subset(samples, 2, None, 0, "abc")
    path = tmp_path / "new" / "shots.json"
    splits.write_index(path, key, few, "abc")
    loaded = json.loads(path.read_text())
    assert loaded["key"] == key
    assert {name: len(keys) for name, keys in loaded["classes"].items()} == {"a": 2, "b": 2, "c": 2}
    again = splits.read_index(path, key, samples)
    assert again.keys == few.keys and np.array_equal(again.rows, few.rows)
    assert [file.name for file in path.parent.iterdir()] == ["shots.json"]
    with pytest.raises(UserError, match="another"):
        splits.read_index(path, key | {"seed": 1}, samples)
    with pytest.raises(UserError, match=r"lists .00"):
        splits.read_index(path, key, samples.subset(np.arange(1)))
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="cannot be read"):
        splits.read_index(path, key, samples)
