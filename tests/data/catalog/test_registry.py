import importlib.machinery
import importlib.util
import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.commands.data import datasets
from randlora_pl.data import catalog
from randlora_pl.data import catalog as prompts
from randlora_pl.data.catalog import PAPER, ROWS, DatasetSpec, find
from randlora_pl.data.readers.trees import INDICES
from randlora_pl.data.validate import _read_classnames, class_names
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item
from tests.support.scripts import load_script


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, randlora_pl.data.catalog; "
        "print([m for m in ('torch', 'numpy', 'lightning', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@in_one_item("row", ROWS)
def test_row_is_complete(row: DatasetSpec) -> None:
    assert row.title and row.license and row.source and row.epochs > 0
    assert all(template.count("{}") == 1 for template in row.templates) and row.templates
    assert len(set(row.classnames)) == len(row.classnames) or "imagenet" in (row.name, row.trains_on)
    assert row.own == (row.classes is None)
    assert row.own or set(row.counts) == ({"test"} if row.trains_on else {"train", "val", "test"})
    module, _, function = row.reader.rpartition(":")
    assert callable(getattr(import_module(module or "randlora_pl.data.readers"), function))
    assert not (row.files and row.by_hand) and bool(row.files or row.by_hand) == bool(row.layout and not row.own)
    assert all("{root}" in "".join(row.by_hand) and "{}" not in line for line in row.by_hand)
    for file in row.files:
        kind, _, digest = file.checksum.partition(":")
        assert len(digest) == {"md5": 32, "sha256": 64, "": 0}[kind] and set(digest) <= set("0123456789abcdef")
        assert all(url.startswith("http") and url.endswith(f"/{file.name}") for url in file.urls)
        assert file.urls or file.page
        assert file.checksum or not file.urls, "a download is resumed and judged by its checksum"


@in_one_item(
    ("name", "classes", "templates", "first"),
    [
        ("digits", 10, 2, "zero"),
        ("resisc45", 45, 18, "airplane"),
        ("svhn", 10, 1, "0"),
        ("caltech256", 257, 34, ""),
        ("cub200", 200, 1, ""),
        ("ucf101", 101, 48, ""),
    ],
)
def test_classes_and_templates(name: str, classes: int, templates: int, first: str) -> None:
    row = find(name)
    assert (row.classes, len(set(row.templates)), len(row.templates)) == (classes, templates, templates)
    assert next(iter(row.classnames), "") == first


# Table 7 of the paper: train, val, test, epochs; but for Caltech 101, whose train figure there is train and val
TABLE_7 = {
    "cars": (7330, 814, 8041, 35),
    "dtd": (3384, 376, 1880, 76),
    "eurosat": (21600, 2700, 2700, 12),
    "gtsrb": (23976, 2664, 12630, 11),
    "mnist": (55000, 5000, 10000, 5),
    "resisc45": (17010, 1890, 6300, 15),
    "sun397": (17865, 1985, 19850, 14),
    "svhn": (68257, 5000, 26032, 4),
    "cifar10": (45000, 5000, 10000, 5),
    "cifar100": (45000, 5000, 10000, 6),
    "imagenet": (1276167, 5000, 50000, 10),
    "stl10": (4500, 500, 8000, 4),
    "food101": (70750, 5000, 25250, 15),
    "caltech101": (6941 - 694, 694, 1736, 10),
    "caltech256": (22037, 2448, 6122, 8),
    "fgvcaircraft": (3334, 3333, 3333, 60),
    "flowers102": (1020, 1020, 6149, 40),
    "oxfordpets": (3312, 368, 3669, 5),
    "cub200": (5395, 599, 5794, 20),
    "pascalvoc": (7844, 7818, 14976, 10),
    "country211": (31650, 10550, 21100, 15),
    "ucf101": (7639, 1898, 3783, 20),
}


def test_counts_and_epochs_are_table_7s() -> None:
    assert tuple(TABLE_7) == PAPER
    for name, expected in TABLE_7.items():
        row = find(name)
        assert (row.counts["train"], row.counts["val"], row.counts["test"], row.epochs) == expected, name


def test_only_digits_and_signs_are_not_flipped() -> None:
    assert {name for name in PAPER if not find(name).flip} == {"mnist", "svhn", "gtsrb"}


def find_origin(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return spec.origin


def test_imagenet_rows_names_are_open_clips() -> None:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    row = find("imagenet")
    assert row.classnames == tuple(IMAGENET_CLASSNAMES)
    assert row.templates == tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    synsets = Path(find_origin("timm")).parent / "data" / "_info" / "imagenet_synsets.txt"
    assert list(row.options["known"]) == synsets.read_text().split() == sorted(row.options["known"])
    twice = {name for name in row.classnames if row.classnames.count(name) > 1}
    assert twice == {"missile", "sunglasses"}  # two synsets each, in CLIP's own list too


def test_catalog_survives_without_open_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert prompts._imagenet() == ((), prompts.PHOTO)
    (tmp_path / "open_clip").mkdir()
    (tmp_path / "open_clip" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.PathFinder.find_spec(name, None))
    assert prompts._imagenet() == ((), prompts.PHOTO)  # a version that has moved its file
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_checksums_are_torchvisions() -> None:
    from torchvision import datasets
    from torchvision.datasets import voc

    known = {md5 for kind in (datasets.MNIST, datasets.FashionMNIST) for _, md5 in kind.resources}
    known |= {kind.tgz_md5 for kind in (datasets.CIFAR10, datasets.CIFAR100, datasets.STL10)}
    known |= {md5 for _, _, md5 in datasets.SVHN.split_list.values()}
    known |= {kind._MD5 for kind in (datasets.Food101, datasets.DTD, datasets.Country211)}
    known |= {md5 for _, md5 in (*datasets.OxfordIIITPet._RESOURCES, *datasets.Flowers102._file_dict.values())}
    known |= {voc.DATASET_YEAR_DICT[part]["md5"] for part in ("2007", "2007-test")}
    kinds = (datasets.GTSRB, datasets.EuroSAT, datasets.Caltech101, datasets.Caltech256, datasets.SUN397)
    texts = "".join(Path(inspect.getfile(kind)).read_text() for kind in kinds)  # written into their functions
    elsewhere = {"cub200": 1, "fgvcaircraft": 1, "resisc45": 3, "sun397": 1, "ucf101": 2}
    elsewhere |= {"imagenet_v2": 1, "imagenet_a": 1, "imagenet_r": 1}  # of TensorFlow Datasets and Torch Uncertainty
    for row in ROWS:
        sums = [file.checksum.partition(":")[2] for file in row.files]
        unknown = [digest for digest in sums if not digest or (digest not in known and digest not in texts)]
        assert len(unknown) == elsewhere.get(row.name, 0), row.name


def test_class_names_are_torchvisions() -> None:
    from torchvision.datasets import FashionMNIST

    assert list(find("fashion_mnist").classnames) == FashionMNIST.classes
    unseen = ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    assert find("fashion_mnist_unseen").classnames == unseen
    assert tuple(FashionMNIST.classes[label] for label in find("fashion_mnist_unseen").options["keep"]) == unseen


def test_unknown_name_suggests() -> None:
    with pytest.raises(UserError, match="'cifar01'"):
        find("cifar01")


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANDLORA_PL_DATA", str(tmp_path))
    assert catalog.default_root() == tmp_path
    monkeypatch.delenv("RANDLORA_PL_DATA")
    assert catalog.default_root().name == "datasets"


def test_each_vendor_of_emoji_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANDLORA_PL_DATA", str(tmp_path))
    vendors = ("google", "apple", "twitter", "facebook")
    for number, vendor in enumerate(vendors):
        assert not catalog.present(find("emoji_groups"), tmp_path)
        assert datasets()["emoji_groups"].startswith("missing: randlora-pl data get emoji_groups")
        (tmp_path / "emoji/img" / vendor / "64").mkdir(parents=True)
        assert catalog.present(find("emoji_tones"), tmp_path), number
    assert catalog.present(find("emoji_groups"), tmp_path) and datasets()["emoji_groups"].startswith("found")


def test_names_are_the_rows_or_those_of_the_users_files(tmp_path: Path) -> None:
    assert class_names(find("digits"), ["0"] * 10)[:2] == ["zero", "one"]
    assert class_names(find("folder"), ["great_cat", "dog"]) == ["great cat", "dog"]
    assert class_names(find("pairs"), ["a_b", "a_b"]) == ["a_b", "a_b"], "captions are what they are"
    (tmp_path / "names.txt").write_text("tench\nshark\n")
    assert class_names(find("folder"), ["n01", "n02"], str(tmp_path / "names.txt")) == ["tench", "shark"]


def test_classnames_files(tmp_path: Path) -> None:
    def names(file: str, content: str) -> list[str]:
        (tmp_path / file).write_text(content)
        return _read_classnames(tmp_path / file, ["n01", "n02"])

    assert names("a.txt", "tench\n\n great white shark \n") == ["tench", "great white shark"]
    assert names("a.csv", "folder,name\nn02,shark\nn01,tench\n") == ["tench", "shark"]
    assert names("b.csv", 'n01,"tench, a fish"\nn02,shark\n') == ["tench, a fish", "shark"]


@in_one_item(
    ("file", "content", "message"),
    [
        ("a.txt", "one", "has 1 class names, the dataset has 2 classes"),
        ("a.csv", "n01,tench,fish", "is not of the form folder,name"),
        ("a.csv", "n1,tench\nn02,shark", r"names the class 'n1', which the dataset does not have. Did you mean 'n01'"),
        ("a.json", '["tench",\n"shark"]', "not read from JSON"),
        ("a.csv", "n01,tench", "no name for 1 of 2 classes, the first: 'n02'"),
    ],
)
def test_wrong_classnames_files(tmp_path: Path, file: str, content: str, message: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        _read_classnames(tmp_path / file, ["n01", "n02"])


def test_missing_classnames_file(tmp_path: Path) -> None:
    for name in ("names.txt", "x" * 300):
        with pytest.raises(UserError, match="exist"):
            _read_classnames(tmp_path / name, ["a"])


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("write_split_indices")


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
