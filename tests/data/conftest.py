"""Tiny datasets in their true on-disk formats, written without any of the readers under test."""

import hashlib
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Tree = Callable[..., Path]


def save_image(path: Path, seed: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """A noisy RGB image of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Makes a folder of images: ``tree(cat=3, dog=2)`` or ``tree(**{"train/cat": 3, "test/cat": 1})``."""

    def make(suffix: str = ".png", **counts: int) -> Path:
        root = tmp_path / "images"
        for name, count in counts.items():
            (root / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                save_image(root / name / f"{number:03d}{suffix}", seed=len(name) * 1000 + number)
        return root

    return make


def write_idx(path: Path, array: np.ndarray) -> None:
    """IDX format of MNIST: magic (0, 0, 8 for ubyte, dimensions), sizes as big-endian int32, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(params=["MNIST", "FashionMNIST"])
def idx_root(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, tuple[np.ndarray, ...]]]:
    """(folder name, root, {split: (images, labels)}) with 60 train and 20 test images in the format of MNIST."""
    return (request.param, tmp_path, make_idx(tmp_path, request.param))


def make_idx(root: Path, name: str) -> dict[str, tuple[np.ndarray, ...]]:
    generator = np.random.default_rng(1)
    made = {}
    for split, prefix, count in (("train", "train", 60), ("test", "t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count) % 10
        write_idx(root / name / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(root / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
        made[split] = (images, labels)
    return made


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, tuple[np.ndarray, ...]]]:
    """(root, {split: (images NHWC, labels)}) in CIFAR-10's pickled batches; torchvision's checksums are replaced."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(2)

    def dump(name: str, content: dict) -> str:
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return hashlib.md5(raw).hexdigest()

    planes = generator.integers(0, 256, (60, 3 * 32 * 32), dtype=np.uint8)
    labels = np.arange(60) % 10
    train_list, test_list = [], []
    for number in range(6):
        here = slice(number * 10, (number + 1) * 10)
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        md5 = dump(name, {"data": planes[here], "labels": labels[here].tolist()})
        (train_list if number < 5 else test_list).append([name, md5])
    meta = dump("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", train_list)
    monkeypatch.setattr(CIFAR10, "test_list", test_list)
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta})
    images = planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return tmp_path, {"train": (images[:50], labels[:50]), "test": (images[50:], labels[50:])}
