"""Formats that hold all images in a few binary files: MNIST, SVHN, CIFAR, STL-10."""

import pickle
from pathlib import Path

import numpy as np
from scipy.io import savemat

from tests.data.conftest import write_idx
from tests.data.readers.pictures import Made, colour, known, write_lines


def _labels(classes: int, each: int) -> np.ndarray:
    """Labels in a scattered order."""
    return np.random.default_rng(classes).permutation(np.repeat(np.arange(classes), each))


def _pixels(labels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (n, size, size, 3), noise of 4 levels, so that no two images are alike."""
    flat = np.asarray([colour(label) for label in labels.tolist()])[:, None, None, :]
    noise = np.random.default_rng(size).integers(-2, 3, (len(labels), size, size, 3))
    return (flat + noise).astype(np.uint8)


def mnist(root: Path) -> Made:
    """IDX files: magic number and sizes big-endian, then the bytes."""
    for prefix, each in (("train", 4), ("t10k", 2)):
        labels = _labels(10, each)
        images = np.repeat(15 + 25 * labels, 28 * 28).reshape(-1, 28, 28)
        write_idx(root / "MNIST/raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(root / "MNIST/raw" / f"{prefix}-labels-idx1-ubyte", labels)
    return Made({"train": 4, "test": 2})


def svhn(root: Path) -> Made:
    """MATLAB files: X of 32 x 32 x 3 x n, y of n x 1 with 10 for the digit 0."""
    (root / "svhn").mkdir(parents=True)
    for split, each in (("train", 4), ("test", 2)):
        labels = _labels(10, each)
        images = _pixels(labels, 32).transpose(1, 2, 3, 0)
        column = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        savemat(root / "svhn" / f"{split}_32x32.mat", {"X": images, "y": column}, do_compression=True)
    return Made({"train": 4, "test": 2}, checksums=("svhn/train_32x32.mat", "svhn/test_32x32.mat"))


def _planes(labels: np.ndarray) -> np.ndarray:
    """CIFAR's rows: the red plane, the green, the blue, each row by row."""
    return _pixels(labels, 32).transpose(0, 3, 1, 2).reshape(len(labels), -1)


def cifar10(root: Path) -> Made:
    """Five training batches and a test batch, pickled by Python 2."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    labels = _labels(10, 5)
    parts = {f"data_batch_{number + 1}": labels[number::5] for number in range(5)} | {"test_batch": _labels(10, 2)}
    for name, part in parts.items():
        files = [f"image_s_{number:06d}.png" for number in range(len(part))]
        content = {"batch_label": name, "labels": part.tolist(), "data": _planes(part), "filenames": files}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    files = (*parts, "batches.meta")
    return Made({"train": 5, "test": 2}, checksums=tuple(f"cifar-10-batches-py/{name}" for name in files))


def cifar100(root: Path) -> Made:
    """One training and one test batch with fine and coarse labels."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, each in (("train", 3), ("test", 1)):
        labels = _labels(100, each)
        content = {
            "filenames": [f"image_s_{number:06d}.png" for number in range(len(labels))],
            "batch_label": name,
            "fine_labels": labels.tolist(),
            "coarse_labels": (labels // 5).tolist(),
            "data": _planes(labels),
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"fine_label_names": known("cifar100"), "coarse_label_names": [f"group_{n}" for n in range(20)]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    files = ("train", "test", "meta")
    return Made({"train": 3, "test": 1}, checksums=tuple(f"cifar-100-python/{name}" for name in files))


def stl10(root: Path) -> Made:
    """Raw bytes, channel by channel and column by column; labels from 1. The unlabelled images are left out."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split, each in (("train", 4), ("test", 2)):
        labels = _labels(10, each)
        (folder / f"{split}_X.bin").write_bytes(_pixels(labels, 96).transpose(0, 3, 2, 1).tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    write_lines(
        folder / "class_names.txt",
        ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"],
    )
    write_lines(folder / "fold_indices.txt", [" ".join(str(n) for n in range(40))] * 10)
    files = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")
    return Made({"train": 4, "test": 2}, checksums=tuple(f"stl10_binary/{name}" for name in files))
