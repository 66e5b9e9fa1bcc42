"""Tar shards in the layout of WebDataset, written by Python's tarfile."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    """The bytes of a noisy PNG."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes | str | int | dict], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file of the given (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            raw = content.encode() if isinstance(content, str) else raw
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path


def write_shards(root: Path, count: int, each: int = 7, classes: int = 3, prefix: str = "train-") -> list[Path]:
    """Shards of ``each`` samples, `000000.png` with `000000.cls`, numbered through."""
    paths = []
    for first in range(0, count, each):
        members: list[tuple[str, bytes | str | int | dict]] = []
        for number in range(first, min(first + each, count)):
            members += [(f"{number:06d}.png", picture(number)), (f"{number:06d}.cls", str(number % classes))]
        paths.append(write_tar(root / f"{prefix}{first // each:06d}.tar", *members))
    return paths
