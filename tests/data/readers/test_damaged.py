"""Data that are incomplete or damaged: each ends in a message that says where."""

import json
import logging
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from randlora_pl.data import ImageData
from randlora_pl.data.catalog.registry import find
from randlora_pl.data.readers.lists import cub200
from randlora_pl.data.splits import subset
from randlora_pl.utils.errors import UserError
from tests.data.readers.annotated import flowers102
from tests.data.readers.conftest import Copies, Copy, allow
from tests.data.readers.pictures import Made, Writer, known
from tests.support.products import in_one_item


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def refused(copy: Copy, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        copy.read(split)
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    return message


def test_flowers_have_fewer_images_than_16_shots(copies: Copies, caplog: pytest.LogCaptureFixture) -> None:
    samples = copies("flowers102").samples("train")
    with caplog.at_level(logging.WARNING):
        chosen = subset(samples, 16, None, 0, samples.classes)
    assert np.bincount(chosen.labels).tolist() == [10] * 102
    assert "102 of 102 classes have fewer than 16 images ('pink primrose' has 10)" in caplog.text


@pytest.mark.parametrize(
    "name", ["dtd", "caltech101", "pascalvoc", "sun397", pytest.param("imagenet", marks=pytest.mark.full)]
)
def test_corrupt_image_is_named(own_copy: Copies, name: str) -> None:
    copy = own_copy(name)
    samples = copy.samples("train")
    path = Path(samples.images.name(int(samples.rows[0])).split(" (")[0])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=f"The image {path} cannot be read"):
        samples.images.load(int(samples.rows[0]))


def test_box_outside_its_image_is_named(own_copy: Copies) -> None:
    copy = own_copy("pascalvoc")
    path = copy.root / "VOCdevkit/VOC2007/Annotations/000001.xml"
    edit(path, "<xmin>9</xmin><ymin>9</ymin><xmax>24</xmax>", "<xmin>90</xmin><ymin>9</ymin><xmax>99</xmax>")
    samples = copy.samples("train")
    with pytest.raises(UserError, match=r"000001\.jpg"):
        samples.images.load(int(samples.rows[0]))


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


def test_class_without_lines_is_named(own_copy: Copies) -> None:
    copy = own_copy("resisc45")
    path = copy.root / "resisc45/resisc45-train.txt"
    path.write_text("".join(f"{line}\n" for line in path.read_text().split() if not line.startswith("sea_ice")))
    assert "45" in refused(copy)


def test_lacking_class_folder_is_named(own_copy: Copies) -> None:
    copy = own_copy("eurosat")
    (copy.root / "eurosat/2750/River").rename(copy.root / "eurosat/2750/Rivers")
    assert "'River'" in refused(copy)
    (copy.root / "eurosat/2750/Rivers").rename(copy.root / "River")
    assert "eurosat/2750" in refused(copy)


def test_class_folder_that_is_none(own_copy: Copies) -> None:
    copy = own_copy("caltech256")
    home = copy.root / "caltech256/256_ObjectCategories"
    (home / "257.clutter").rename(home / "clutter")
    assert f"{home / 'clutter'} is not one of its 257 classes" in refused(copy)
    (home / "clutter").rename(copy.root / "clutter")
    assert f"{home} has 256 of 257 class folders, 257.* is missing)" in refused(copy)


def test_imagenet_validation_images_that_are_not_sorted(tmp_path: Path) -> None:
    for number in range(3):
        Writer()(tmp_path / f"imagenet/val/ILSVRC2012_val_{number:08d}.JPEG", number)
    message = refused(Copy(find("imagenet"), tmp_path, Made({"test": 1})), "test")
    assert "n01440764" in message and "folders" in message


def test_eurosat_file_with_another_name(own_copy: Copies) -> None:
    copy = own_copy("eurosat")
    path = next((copy.root / "eurosat/2750/Forest").iterdir())
    path.rename(path.with_name("forest.jpg"))
    assert "eurosat/2750/CLASS/CLASS_N.jpg" in refused(copy)


LISTS = {
    "dtd": "dtd/dtd/labels/train1.txt",
    "fgvcaircraft": "fgvc-aircraft-2013b/data/images_variant_train.txt",
    "oxfordpets": "oxford-iiit-pet/annotations/trainval.txt",
    "resisc45": "resisc45/resisc45-train.txt",
    "sun397": "SUN397/Training_01.txt",
    "cub200": "CUB_200_2011/images.txt",
    "pascalvoc": "VOCdevkit/VOC2007/ImageSets/Main/train.txt",
}


@in_one_item("name", LISTS)
def test_duplicate_path_is_named(own_copy: Copies, name: str) -> None:
    copy = own_copy(name)
    path = copy.root / LISTS[name]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[3]]) + "\n")
    assert "listed" in refused(copy)


def test_duplicate_path_in_json_and_csv(own_copy: Copies) -> None:
    copy = own_copy("ucf101")
    path = copy.root / "ucf101/split_zhou_UCF101.json"
    listed = json.loads(path.read_text())
    listed["train"].append(listed["train"][0])
    path.write_text(json.dumps(listed))
    image = listed["train"][0][0]
    assert refused(copy) == f"{copy.row.title}: the train part of {path}: {image!r} is listed twice"
    copy = own_copy("gtsrb")
    path = copy.root / "gtsrb/GT-final_test.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    assert "'gtsrb/GTSRB/Final_Test/Images/00000.ppm'" in refused(copy, "test")


@in_one_item("name", [*LISTS, "food101", "ucf101", "cars", "flowers102"])
def test_image_that_is_listed_but_not_there(own_copy: Copies, name: str) -> None:
    copy = own_copy(name)
    samples = copy.samples("train")
    path = Path(samples.images.name(int(samples.rows[7])).split(" (")[0])
    path.unlink()
    message = refused(copy)
    assert str(path) in message and message.startswith(f"{copy.row.title} is missing or damaged in {copy.root}")


@pytest.mark.parametrize("file", ["image_class_labels.txt", "train_test_split.txt"])
def test_missing_annotation_line_is_named(own_copy: Copies, file: str) -> None:
    copy = own_copy("cub200")
    path = copy.root / "CUB_200_2011" / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:6] + lines[7:]) + "\n")
    assert f"{path} has no line for image 7 (002.Grey_headed_Bird_1/" in refused(copy)


def test_missing_label_of_a_flower(own_copy: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = own_copy("flowers102")
    path = copy.root / "flowers-102/imagelabels.mat"
    savemat(path, {"labels": loadmat(path)["labels"][:, :-20]})
    allow(copy, monkeypatch)
    assert "102" in refused(copy) and "KeyError" in refused(copy)


def test_missing_annotation_of_boxes(own_copy: Copies) -> None:
    copy = own_copy("pascalvoc")
    path = copy.root / "VOCdevkit/VOC2007/Annotations/000002.xml"
    whole = path.read_text()
    path.unlink()
    assert f"{path} does not exist" in refused(copy)
    for text, why in (
        (whole[:90], "cannot be read: "),
        (whole.replace("<bndbox>", "<box>").replace("</bndbox>", "</box>"), "an object has no name or no bndbox"),
        (whole.replace("<xmax>24</xmax>", "<xmax>2</xmax>"), "the box 9,9,2,32 is empty"),
        (whole.replace("<xmax>24</xmax>", ""), "cannot be read: "),
        ("<annotation/>", "no object is annotated"),
    ):
        path.write_text(text)
        message = refused(copy)
        assert message.startswith(f"The annotation {path} cannot be read") and why in message
    top = ElementTree.fromstring(whole)
    next(top.iter("name")).text = "unicorn"
    path.write_text(ElementTree.tostring(top, encoding="unicode"))
    assert "'unicorn'" in refused(copy)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("resisc45", "castle_001.jpg", "line 1: 'castle_001.jpg' is not of the form CLASS_NUMBER.jpg"),
        ("sun397", "/z/zoo/sun_1.jpg", "line 1: '/z/zoo/sun_1.jpg' is not of the form /CLASS/IMAGE.jpg"),
        ("cub200", "one 001.Bird/a.jpg", "line 1: 'one 001.Bird/a.jpg' is not of the form NUMBER VALUE"),
        ("oxfordpets", "Abyssinian_1 1", "ValueError: not enough values to unpack"),
        ("fgvcaircraft", "1000000 747-8000", "KeyError: '747-8000'"),
        ("dtd", "banded_0001.jpg", "ValueError: not enough values to unpack"),
    ],
)
def test_wrong_line_is_shown(own_copy: Copies, name: str, line: str, message: str) -> None:
    copy = own_copy(name)
    path = copy.root / LISTS[name]
    path.write_text("\n".join([line, *path.read_text().splitlines()]) + "\n")
    assert message in refused(copy)


def test_class_numbers_that_do_not_exist(own_copy: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = own_copy("cub200")
    edit(copy.root / "CUB_200_2011/image_class_labels.txt", "7 2\n", "7 201\n")
    assert "201" in refused(copy)
    copy = own_copy("flowers102")
    path = copy.root / "flowers-102/imagelabels.mat"
    labels = loadmat(path)["labels"]
    labels[labels == 102] = 103
    savemat(path, {"labels": labels})
    allow(copy, monkeypatch)
    assert "102" in refused(copy)


def test_files_that_name_too_few_classes(own_copy: Copies) -> None:
    copy = own_copy("cub200")
    path = copy.root / "CUB_200_2011/classes.txt"
    path.write_text("".join(f"{line}\n" for line in [*path.read_text().splitlines(), "201 201.Phoenix"]))
    assert "201" in refused(copy)
    copy = own_copy("fgvcaircraft")
    path = copy.root / "fgvc-aircraft-2013b/data/variants.txt"
    path.write_text(path.read_text() + "Concorde\n")
    assert f"its files in {copy.root} have 101 classes, expected 100" in refused(copy)
    copy = own_copy("dtd")
    path = copy.root / "dtd/dtd/labels/val1.txt"
    path.write_text("".join(f"{line}\n" for line in path.read_text().split() if not line.startswith("bumpy")))
    assert "'bumpy'" in refused(copy)


def test_split_file_of_ucf101_that_is_none(own_copy: Copies) -> None:
    copy = own_copy("ucf101")
    path = copy.root / "ucf101/split_zhou_UCF101.json"
    for text in ("{", "[]", '{"train": [["a.jpg", 0]]}', '{"val": []}'):
        path.write_text(text)
        assert f"{path} cannot be read" in refused(copy)


def test_list_that_is_no_text(own_copy: Copies) -> None:
    copy = own_copy("resisc45")
    (copy.root / "resisc45/resisc45-train.txt").write_bytes(b"\xff\xfe\x00airplane")
    assert "resisc45/resisc45-train.txt" in refused(copy)


def test_damaged_binary_files(own_copy: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file in (("stl10", "stl10_binary/train_X.bin"), ("svhn", "svhn/train_32x32.mat")):
        copy = own_copy(name)
        path = copy.root / file
        path.write_bytes(path.read_bytes()[:-9])
        assert f"{copy.row.title} is missing or damaged in {copy.root}" in refused(copy)
        allow(copy, monkeypatch)  # as if the source itself were damaged
        assert "Error" in refused(copy)


def test_stl10_does_not_need_its_unlabelled_images(copies: Copies) -> None:
    copy = copies("stl10")
    assert not (copy.root / "stl10_binary/unlabeled_X.bin").exists()
    assert len(copy.samples("train")) == 40


def test_flowers_of_another_size(tmp_path: Path, copies: Copies, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Copy(copies("flowers102").row, tmp_path, flowers102(tmp_path, train=2))
    allow(copy, monkeypatch)
    assert len(copy.samples("train")) == 204
    assert cub200(copy.row, tmp_path, "val") is None


def test_class_folders_that_are_numbers_must_be_the_labels(own_copy: Copies) -> None:
    copy = own_copy("gtsrb")
    home = copy.root / "gtsrb/GTSRB/Training"
    (home / "00014").rename(home / "stop")  # every later class would shift by one
    assert "00015" in refused(copy)


def test_resisc45_without_class_folders(own_copy: Copies) -> None:
    copy = own_copy("resisc45")
    before = copy.samples("train")
    home = copy.root / "resisc45/NWPU-RESISC45"
    for path in list(home.glob("*/*.jpg")):
        path.rename(home / path.name)
    flat = copy.samples("train")
    assert [key.rpartition("/")[2] for key in before.keys] == list(flat.keys)
    assert np.array_equal(before.labels, flat.labels)


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
