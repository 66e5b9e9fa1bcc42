"""Data that are incomplete or damaged: each ends in a message that says where."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from randlora_pl.data import ImageData
from randlora_pl.data.catalog import find
from randlora_pl.data.readers.lists import cub200
from randlora_pl.utils.errors import UserError
from tests.data.readers.annotated import flowers102
from tests.data.readers.conftest import Copies, Copy, allow
from tests.data.readers.pictures import Made, Writer, known
from tests.support.products import in_one_item


def edit(path: Path, pattern: str, new: str) -> None:
    text = path.read_text()
    path.write_text(re.sub(pattern, new, text))
    assert path.read_text() != text


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Restore a file of a shared copy after the block."""
    before = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(before)


def refused(copy: Copy, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        copy.read(split)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


LISTS = {
    "dtd": "dtd/dtd/labels/train1.txt",
    "fgvcaircraft": "fgvc-aircraft-2013b/data/images_variant_train.txt",
    "oxfordpets": "oxford-iiit-pet/annotations/trainval.txt",
    "resisc45": "resisc45/resisc45-train.txt",
    "sun397": "SUN397/Training_01.txt",
    "cub200": "CUB_200_2011/images.txt",
    "pascalvoc": "VOCdevkit/VOC2007/ImageSets/Main/train.txt",
}
CUB, UCF101 = "CUB_200_2011", "ucf101/split_zhou_UCF101.json"
AIRCRAFT, BOXES = "fgvc-aircraft-2013b/data/variants.txt", "VOCdevkit/VOC2007/Annotations/000002.xml"
NO_LINE = "has no line for image 7 (002.Grey_headed_Bird_1/"


@in_one_item(
    ("name", "file", "pattern", "new", "message"),
    [
        *((name, file, r"\A(.*\n)", r"\1\1", "listed") for name, file in LISTS.items()),
        ("resisc45", LISTS["resisc45"], "(?m)^sea_ice.*\n", "", "45"),
        ("resisc45", LISTS["resisc45"], r"\A", "castle_001.jpg\n", "line 1: 'castle_001.jpg' is not of the form CLASS"),
        ("sun397", LISTS["sun397"], r"\A", "/z/zoo/sun_1.jpg\n", "line 1: '/z/zoo/sun_1.jpg' is not of the form /"),
        ("cub200", LISTS["cub200"], r"\A", "one 001.B/a.jpg\n", "line 1: 'one 001.B/a.jpg' is not of the form NUM"),
        ("oxfordpets", LISTS["oxfordpets"], r"\A", "Abyssinian_1 1\n", "ValueError: not enough values to unpack"),
        ("fgvcaircraft", LISTS["fgvcaircraft"], r"\A", "1000000 747-8000\n", "KeyError: '747-8000'"),
        ("dtd", LISTS["dtd"], r"\A", "banded_0001.jpg\n", "ValueError: not enough values to unpack"),
        ("dtd", "dtd/dtd/labels/val1.txt", "(?m)^bumpy.*\n", "", "'bumpy'"),
        ("cub200", f"{CUB}/image_class_labels.txt", "(?m)^7 .*\n", "", f"image_class_labels.txt {NO_LINE}"),
        ("cub200", f"{CUB}/train_test_split.txt", "(?m)^7 .*\n", "", f"train_test_split.txt {NO_LINE}"),
        ("cub200", f"{CUB}/image_class_labels.txt", "(?m)^7 2$", "7 201", "201"),
        ("cub200", f"{CUB}/classes.txt", r"\Z", "201 201.Phoenix\n", "201"),
        ("fgvcaircraft", AIRCRAFT, r"\Z", "Concorde\n", "have 101 classes, expected 100"),
        *(("ucf101", UCF101, "(?s).+", text, f"{UCF101} cannot be read") for text in ("{", "[]", '{"val": []}')),
        ("ucf101", UCF101, "(?s).+", '{"train": [["a.jpg", 0]]}', f"{UCF101} cannot be read"),
        ("ucf101", UCF101, r'("train": \[)(.*?\], )', r"\1\2\2", "_g01_c01.jpg' is listed twice"),
        ("pascalvoc", BOXES, "(?s)(.{90}).+", r"\1", f"{BOXES} cannot be read: "),
        ("pascalvoc", BOXES, "bndbox>", "box>", f"{BOXES} cannot be read: an object has no name or no bndbox"),
        ("pascalvoc", BOXES, "<xmax>24</xmax>", "<xmax>2</xmax>", f"{BOXES} cannot be read: the box 9,9,2,32 is empty"),
        ("pascalvoc", BOXES, "<xmax>24</xmax>", "", f"{BOXES} cannot be read: "),
        ("pascalvoc", BOXES, "(?s).+", "<annotation/>", f"{BOXES} cannot be read: no object is annotated"),
        ("pascalvoc", BOXES, "<name>[^h<]+<", "<name>unicorn<", "'unicorn'"),
    ],
)
def test_damaged_annotations_are_named(
    copies: Copies, name: str, file: str, pattern: str, new: str, message: str
) -> None:
    copy = copies(name)
    with changing(copy.root / file):
        edit(copy.root / file, pattern, new)
        assert message in refused(copy)


@pytest.mark.parametrize("name", ["dtd", "pascalvoc"])
def test_corrupt_image_is_named(own_copy: Copies, name: str) -> None:
    copy = own_copy(name)
    samples = copy.samples("train")
    path = Path(samples.images.name(int(samples.rows[0])).split(" (")[0])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"The image {path} cannot be read"):
        samples.images.load(int(samples.rows[0]))


def test_box_outside_its_image_and_absent_boxes_are_named(own_copy: Copies) -> None:
    copy = own_copy("pascalvoc")
    path = copy.root / "VOCdevkit/VOC2007/Annotations/000001.xml"
    edit(path, "<xmin>9</xmin><ymin>9</ymin><xmax>24</xmax>", "<xmin>90</xmin><ymin>9</ymin><xmax>99</xmax>")
    samples = copy.samples("train")
    with pytest.raises(UserError, match=r"000001\.jpg"):
        samples.images.load(int(samples.rows[0]))
    path.unlink()
    assert f"{path} does not exist" in refused(copy)


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("caltech101", "caltech101/101_ObjectCategories/ant", "1 of 101 classes have no training images.*'ant'"),
        pytest.param(
            "imagenet",
            "imagenet/train/n01440764",
            r"1 of 1000 classes have no training images.*'tench' \(label 0\)",
            marks=pytest.mark.full,
        ),
        ("country211", "country211/train/AF", "1 of 211 classes have no training images.*'Afghanistan'"),
        ("gtsrb", "gtsrb/GTSRB/Training/00014", "GTSRB.*"),  # torchvision says it
    ],
)
def test_empty_class_is_named(own_copy: Copies, name: str, folder: str, message: str) -> None:
    copy = own_copy(name)
    for path in (copy.root / folder).iterdir():
        path.unlink()
    with pytest.raises(UserError, match=message):
        copy.read("train")


CALTECH, EUROSAT, GTSRB = "caltech256/256_ObjectCategories", "eurosat/2750", "gtsrb/GTSRB/Training"


@in_one_item(
    ("name", "old", "new", "message"),
    [
        ("eurosat", f"{EUROSAT}/River", f"{EUROSAT}/Rivers", "'River'"),
        ("eurosat", f"{EUROSAT}/River", "River", EUROSAT),
        ("eurosat", f"{EUROSAT}/Forest/*_?.jpg", f"{EUROSAT}/Forest/forest.jpg", f"{EUROSAT}/CLASS/CLASS_N.jpg"),
        ("caltech256", f"{CALTECH}/257.clutter", f"{CALTECH}/clutter", "/clutter is not one of its 257 classes"),
        ("caltech256", f"{CALTECH}/257.clutter", "clutter", "has 256 of 257 class folders, 257.* is missing)"),
        ("gtsrb", f"{GTSRB}/00014", f"{GTSRB}/stop", "00015"),  # every later class would shift by one
    ],
)
def test_folders_and_files_of_other_names(copies: Copies, name: str, old: str, new: str, message: str) -> None:
    copy = copies(name)
    place = next(copy.root.glob(old))
    place.rename(copy.root / new)
    try:
        assert message in refused(copy)
    finally:
        (copy.root / new).rename(place)


def test_imagenet_validation_images_that_are_not_sorted(tmp_path: Path) -> None:
    for number in range(3):
        Writer()(tmp_path / f"imagenet/val/ILSVRC2012_val_{number:08d}.JPEG", number)
    message = refused(Copy(find("imagenet"), tmp_path, Made({"test": 1})), "test")
    assert "n01440764" in message and "folders" in message


def test_duplicate_path_in_a_table_of_tests(copies: Copies) -> None:
    copy = copies("gtsrb")
    path = copy.root / "gtsrb/GT-final_test.csv"
    with changing(path):
        edit(path, r"(\n.*\n)\Z", r"\1\1")
        assert "is listed twice" in refused(copy, "test")


@in_one_item("name", [*LISTS, "food101", "ucf101", "cars", "flowers102"])
def test_image_that_is_listed_but_not_there(copies: Copies, name: str) -> None:
    copy = copies(name)
    samples = copy.samples("train")
    path = Path(samples.images.name(int(samples.rows[7])).split(" (")[0])
    with changing(path):
        path.unlink()
        message = refused(copy)
    assert str(path) in message and message.startswith(f"{copy.row.title} is missing or damaged in {copy.root}")


def test_labels_of_flowers_that_lack_or_do_not_exist(own_copy: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = own_copy("flowers102")
    path = copy.root / "flowers-102/imagelabels.mat"
    labels = loadmat(path)["labels"]
    for damaged, word in ((labels[:, :-20], "KeyError"), (np.where(labels == 102, 103, labels), "102")):
        savemat(path, {"labels": damaged})
        allow(copy, monkeypatch)
        assert word in (message := refused(copy)) and "102" in message


def test_list_that_is_no_text(own_copy: Copies) -> None:
    copy = own_copy("resisc45")
    (copy.root / "resisc45/resisc45-train.txt").write_bytes(b"\xff\xfe\x00airplane")
    assert "resisc45/resisc45-train.txt" in refused(copy)


def test_damaged_binary_files(own_copy: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in (
        ("stl10", "stl10_binary/train_X.bin"),
        ("svhn", "svhn/train_32x32.mat"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
    ):
        copy = own_copy(name)
        path = copy.root / file
        path.write_bytes(path.read_bytes()[:-9])
        assert f"{copy.row.title} is missing or damaged in {copy.root}" in refused(copy)
        allow(copy, monkeypatch)  # as if the source itself were damaged
        assert "Error" in refused(copy)


def test_flowers_of_another_size(tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Copy(copies("flowers102").row, tmp_path, flowers102(tmp_path, train=2))
    allow(copy, monkeypatch)
    assert len(copy.samples("train")) == 204
    assert cub200(copy.row, tmp_path, "val") is None


def test_a_test_split_needs_no_training_images(tmp_path: Path) -> None:
    for label, wnid in enumerate(known("imagenet")):
        Writer()(tmp_path / "imagenet/val" / wnid / f"{label}.JPEG", label)
    data = ImageData(dataset="imagenet", root=str(tmp_path), image_size=8)
    data.setup("test")
    assert len(data.samples("test")) > 0 and data.num_classes == 1000
    with pytest.raises(UserError, match="imagenet/train"):
        data.setup("fit")


def test_a_partial_data_set_is_remarked(own_copy: Copies, caplog: pytest.LogCaptureFixture) -> None:
    copy = own_copy("eurosat")
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        ImageData(dataset="eurosat", root=str(copy.root), image_size=8).setup("test")
    assert "test images here, expected 2,700" in caplog.text
    assert f"randlora-pl data check eurosat --root {copy.root}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "randlora_pl"):
        ImageData(dataset="digits", image_size=8).setup()
    assert caplog.text == ""
