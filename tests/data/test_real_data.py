"""Real images that are at hand without a download: Fashion-MNIST of Debian, digits of scikit-learn."""

import gzip
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

FASHION = Path("/usr/share/datasets/fashion-mnist")
PARTS = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


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


def flat(loader: Loader) -> tuple[np.ndarray, np.ndarray]:
    """All images of a loader, as rows, and their labels."""
    batches = list(loader)
    images, labels, weights = (torch.cat([batch[key] for batch in batches]) for key in ("image", "label", "weight"))
    return images[weights > 0].flatten(1).numpy(), labels[weights > 0].numpy()


def pixels(samples: Samples) -> np.ndarray:
    return np.stack([samples.images.load(row) for row in samples.rows.tolist()])


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


def test_plain_classifiers_learn_digits_of_sixteen_shots() -> None:
    """Each is drawn once and uncropped; chance is 0.1."""
    data = ImageData(
        shots=16, image_size=8, batch_size=16, epochs=1, min_batches_per_epoch=0, sampling="epochs",
        crop_scale=(1, 1), flip=False, num_workers=0,
    )  # fmt: skip
    data.setup()
    shots, labels = flat(data.train_dataloader())
    images, truth = flat(data.test_dataloader())
    assert np.bincount(labels).tolist() == [16] * 10 and np.array_equal(truth, data.samples("test").labels)
    for classifier in (NearestCentroid(), LogisticRegression(C=0.01, max_iter=300)):
        assert classifier.fit(shots, labels).score(images, truth) > 0.85
