"""Formats whose folders are the classes: EuroSAT, GTSRB, ImageNet, Caltech, Country211."""

import json
from pathlib import Path

from tests.data.readers.pictures import Made, Writer, known, write_lines


def _index(name: str) -> dict[str, dict[str, list[int]]]:
    """The numbers of the images of each split and class that the package has written down."""
    import randlora_pl.data

    path = Path(randlora_pl.data.__file__).parent / "indices" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


def eurosat(root: Path) -> Made:
    """``2750/CLASS/CLASS_N.jpg``, 64 x 64 pixels in the original; N is chosen so that each split has some."""
    listed, write = _index("eurosat"), Writer()
    for label, name in enumerate(known("eurosat")):
        val, test = listed["val"][name], listed["test"][name]
        train = [number for number in range(1, 2001) if number not in {*val, *test}]
        for number in (*train[:3], *val[:1], *test[:2]):
            write(root / "eurosat/2750" / name / f"{name}_{number}.jpg", label)
    return Made({"train": 3, "val": 1, "test": 2})


def gtsrb(root: Path) -> Made:
    """PPM files; the training classes are folders with a CSV each, the test classes are in one CSV."""
    home, write = root / "gtsrb", Writer()
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    test = [header]
    for label in range(43):
        folder = home / "GTSRB/Training" / f"{label:05d}"
        train = [header]
        for number in range(3):
            write(folder / f"00000_{number:05d}.ppm", label, "ppm")
            train.append(f"00000_{number:05d}.ppm;24;16;2;2;22;14;{label}")
        write_lines(folder / f"GT-{label:05d}.csv", train)
    for number in range(86):
        label = number * 7 % 43
        write(home / "GTSRB/Final_Test/Images" / f"{number:05d}.ppm", label, "ppm")
        test.append(f"{number:05d}.ppm;24;16;2;2;22;14;{label}")
    write_lines(home / "GT-final_test.csv", test)
    return Made({"train": 3, "test": 2})


def imagenet(root: Path) -> Made:
    """``train/WNID/WNID_N.JPEG`` and the validation images sorted into folders."""
    write = Writer()
    for label, wnid in enumerate(known("imagenet")):
        for number in range(3):
            write(root / "imagenet/train" / wnid / f"{wnid}_{number * 17}.JPEG", label)
        write(root / "imagenet/val" / wnid / f"ILSVRC2012_val_{label:08d}.JPEG", label)
    return Made({"train": 3, "test": 1})


def caltech101(root: Path) -> Made:
    """``101_ObjectCategories/CLASS/image_NNNN.jpg`` beside a background class that is none, and stray files."""
    home, write = root / "caltech101/101_ObjectCategories", Writer()
    listed = _index("caltech101")["test"]
    for label, name in enumerate(known("caltech101")):
        test = listed[name]
        train = [number for number in range(1, 32) if number not in test]
        for number in (*train[:4], *test[:1]):
            write(home / name / f"image_{number:04d}.jpg", label)
    write(home / "BACKGROUND_Google" / "image_0001.jpg", 0)
    (home / "BACKGROUND_Google" / "tmp").write_text("")
    (home / "ant" / "Thumbs.db").write_bytes(b"\0")
    return Made({"train": 4, "test": 1})


def caltech256(root: Path) -> Made:
    """``256_ObjectCategories/NNN.name/NNN_NNNN.jpg``, 257 classes, with the archive's stray folder and file."""
    home, write = root / "caltech256/256_ObjectCategories", Writer()
    special = {0: "ak47", 2: "american-flag", 252: "faces-easy-101", 251: "car-side-101", 256: "clutter"}
    names = [special.get(label, f"thing-{label + 1}-b") for label in range(257)]
    for label, name in enumerate(names):
        for number in range(1, 6):
            write(home / f"{label + 1:03d}.{name}" / f"{label + 1:03d}_{number:04d}.jpg", label)
    (home / "198.thing-198-b" / "RENAME2").write_text("mv a b\n")
    write(home / "056.thing-56-b" / "greg" / "vision309" / "056_0001.jpg", 0)
    clean = {252: "faces easy", 251: "car side"}
    return Made({"train": 5}, [clean.get(label, name.replace("-", " ")) for label, name in enumerate(names)])


def country211(root: Path) -> Made:
    """``train``, ``valid`` and ``test`` with a folder for each country code."""
    write = Writer()
    for label, code in enumerate(known("country211")):
        for split, each in (("train", 3), ("valid", 1), ("test", 1)):
            for number in range(each):
                write(root / "country211" / split / code / f"{label * 991 + number:09d}_{split}.jpg", label)
    return Made({"train": 3, "val": 1, "test": 1})
