import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from randlora_pl.data import catalog
from randlora_pl.data.catalog import CATALOG, FASHION_UNSEEN, ROWS, Row, find
from randlora_pl.errors import UserError


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys, randlora_pl.data.catalog; "
        "print([m for m in ('torch', 'numpy', 'lightning', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_complete(row: Row) -> None:
    assert row.title and row.licence and row.source and row.epochs > 0
    assert all(template.count("{}") == 1 for template in row.templates) and row.templates
    assert len(set(row.classnames)) == len(row.classnames)
    assert row.own == (not row.classnames) == (row.classes is None)
    assert row.own or set(row.counts) == {"train", "val", "test"}
    module, _, function = row.reader.rpartition(":")
    assert callable(getattr(import_module(module or "randlora_pl.data.readers"), function))
    if row.download:
        assert row.layout


@pytest.mark.parametrize(
    ("name", "classes", "templates", "first"),
    [("mnist", 10, 1, "0"), ("cifar10", 10, 18, "airplane"), ("digits", 10, 2, "zero")],
)
def test_classes_and_templates(name: str, classes: int, templates: int, first: str) -> None:
    row = find(name)
    assert (row.classes, len(set(row.templates)), row.classnames[0]) == (classes, templates, first)


def test_class_names_are_torchvisions() -> None:
    from torchvision.datasets import FashionMNIST

    assert list(find("fashion_mnist").classnames) == FashionMNIST.classes
    unseen = ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    assert find("fashion_mnist_unseen").classnames == unseen
    assert tuple(FashionMNIST.classes[label] for label in FASHION_UNSEEN) == unseen


def test_unknown_name_suggests() -> None:
    with pytest.raises(UserError, match=r"no data set 'cifar01'. Did you mean 'cifar10'\?.*folder"):
        find("cifar01")


def test_names_are_unique() -> None:
    assert len(CATALOG) == len(ROWS)


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANDLORA_DATA", str(tmp_path))
    assert catalog.default_root() == tmp_path
    monkeypatch.delenv("RANDLORA_DATA")
    assert catalog.default_root().name == "datasets"


def test_package_loads_lazily() -> None:
    import randlora_pl.data as data
    from randlora_pl.data.module import ImageData

    assert data.ImageData is ImageData
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = data.nothing_here
