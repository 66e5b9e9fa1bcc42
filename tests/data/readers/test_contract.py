"""What holds for every dataset, over a copy of its true on-disk format."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.data.catalog import ROWS
from randlora_pl.data.module import ImageData
from randlora_pl.data.readers import read
from randlora_pl.data.sources import ArrayImages
from randlora_pl.data.splits import Splits, subset
from randlora_pl.utils.errors import UserError
from tests.data.readers import BUILDERS
from tests.data.readers.conftest import Copies, Copy
from tests.data.readers.pictures import SIZE, label_of
from tests.support.products import in_one_item

SPLITS = ("train", "val", "test")


CHECKS: list[Callable[[Copy], None]] = []


def of_every_row(check: Callable[[Copy], None]) -> Callable[[Copy], None]:
    CHECKS.append(check)
    return check


@pytest.mark.parametrize("name", BUILDERS)
def test_contract(name: str, copies: Copies, subtests: pytest.Subtests) -> None:
    copy = replace(copies(name))
    copy.read = cache(copy.read)  # type: ignore[method-assign]
    for check in CHECKS:
        with subtests.test(check.__name__):
            check(copy)


def test_every_format_has_a_builder() -> None:
    on_disk = {row.name for row in ROWS if row.layout and not row.own}
    clothes = {name for name in on_disk if name.startswith("fashion_mnist")}  # MNIST's format: test_dispatch.py
    shifted = {row.name for row in ROWS if row.trains_on}  # test_shifts.py
    drawn = {"emoji_names", "emoji_names_mixed", "emoji_groups", "emoji_subgroups"}  # test_emoji.py
    assert set(BUILDERS) == on_disk - clothes - shifted - drawn


@of_every_row
def lengths_and_labels(copy: Copy) -> None:
    for split in SPLITS:
        samples = copy.read(split)
        each = copy.made.sizes.get(split)
        if each is None:
            assert samples is None
            continue
        assert samples is not None
        assert np.bincount(samples.labels).tolist() == [each] * copy.row.classes  # type: ignore[operator]
        assert len(set(samples.keys)) == len(samples.keys) == len(samples.labels)
        assert list(samples.keys) == sorted(samples.keys)


@of_every_row
def class_names(copy: Copy) -> None:
    names = copy.samples("train").classes
    if copy.made.names:
        assert not copy.row.classnames and list(names) == copy.made.names
    else:
        assert names == copy.row.classnames
    assert len(names) == copy.row.classes


@of_every_row
def pixels_are_rgb_and_agree_with_labels(copy: Copy) -> None:
    shapes = set()
    for split in copy.made.sizes:
        samples = copy.samples(split)
        clear = 0
        looked = slice(None, None, 1 + 2 * (len(samples) // 1000))  # odd: the kinds of images come in turns of eight
        for label, row in zip(samples.labels[looked].tolist(), samples.rows[looked].tolist(), strict=True):
            image = samples.images.load(row)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.flags.c_contiguous
            shapes.add(image.shape)
            if copy.row.name == "mnist":
                assert image.shape == (28, 28, 1) and round((int(image[14, 14, 0]) - 15) / 25) == label
                continue
            assert image.shape[2] == 3
            shown = label_of(image[image.shape[0] // 2, image.shape[1] // 2])
            assert shown in (label, None), samples.images.name(row)
            clear += shown is not None
        assert copy.row.name == "mnist" or clear > len(samples.rows[looked]) / 3
    if not isinstance(samples.images, ArrayImages) and copy.row.name not in ("gtsrb", "pascalvoc"):
        assert shapes == {(SIZE[1], SIZE[0], 3), (SIZE[0], SIZE[1], 3)}  # EXIF: some are turned upright
    if copy.row.name == "pascalvoc":
        assert shapes == {(24, 16, 3), (32, 32, 3)}  # corners count from 1 and are part of the box


@of_every_row
def splits_are_disjoint_and_complete(copy: Copy) -> None:
    found = Splits(copy.read)
    names = {
        split: {getattr(found, split).images.name(row) for row in getattr(found, split).rows.tolist()}
        for split in SPLITS
    }
    sizes = {split: len(getattr(found, split)) for split in SPLITS}
    assert {split: len(names[split]) for split in SPLITS} == sizes
    assert not names["train"] & names["val"] and not names["train"] & names["test"] and not names["val"] & names["test"]
    assert sum(sizes.values()) == sum(copy.made.sizes.values()) * (copy.row.classes or 0)
    assert found.has("val") == ("val" in copy.made.sizes)
    if not found.has("val"):
        assert sizes["val"] == (sizes["train"] + sizes["val"]) // 10


@of_every_row
def shots_are_exact(copy: Copy) -> None:
    samples = Splits(copy.read).train
    classes = copy.row.classes or 0
    chosen = subset(samples, 2, None, 3, samples.classes)
    assert np.bincount(chosen.labels, minlength=classes).tolist() == [2] * classes
    assert set(subset(samples, 1, None, 3, samples.classes).keys) < set(chosen.keys) <= set(samples.keys)
    other = subset(samples, 1, None, 4, samples.classes)
    assert set(other.keys) != set(subset(samples, 1, None, 3, samples.classes).keys)


@in_one_item("name", BUILDERS)
@in_one_item("split", ["train", "test"])
def test_missing_data_say_what_belongs_where(tmp_path: Path, name: str, split: str, copies: Copies) -> None:
    row = copies(name).row
    if split not in copies(name).made.sizes:
        assert read(row, tmp_path, split) is None
        return
    with pytest.raises(UserError) as caught:
        read(row, tmp_path, split)
    message = str(caught.value)
    assert message.startswith(f"{row.title} is missing or damaged in {tmp_path}")
    assert f"expected {row.layout}" in message and len(message.splitlines()) == 2
    assert message.endswith(f"Get it: randlora-pl data get {name} --root {tmp_path}")


@of_every_row
def batches(copy: Copy) -> None:
    data = ImageData(
        dataset=copy.row.name, root=str(copy.root), shots=2, image_size=32, batch_size=8, steps=1, num_workers=0
    )
    data.setup("fit")
    assert data.num_classes == copy.row.classes == len(data.classnames)
    assert data.classnames == list(copy.row.classnames or copy.made.names)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert int(batch["label"].min()) >= 0 and int(batch["label"].max()) < data.num_classes
