"""Tiny datasets in their true on-disk formats, written without any of the readers under test."""

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
