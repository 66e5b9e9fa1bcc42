"""Samples of a split as numbers, by which the processes of a job find out whether they have the same."""

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.data.sources import ArrayImages, FileImages

TEXTS = ("class names", "templates")
"""Parts that are words of the dataset or of a file of the user."""
BLOCK = 1024
"""Samples that have a checksum of their own."""
_MOST_FILES = 10_000
"""Files of a split whose size is read, evenly spread: a million takes minutes on a network disk."""
_MOST_TOKENS = 8
"""Tokens of a text in its description."""


@dataclass(frozen=True)
class Part:
    """Samples of a split.

    Attributes:
        table: int64 (samples, columns), numbers that differ if a sample differs.
        describe: Returns a description of a sample, by its index.
    """

    table: NDArray[np.int64]
    describe: Callable[[int], str]

    def digest(self) -> list[Any]:
        """Return the number of samples and a checksum of all."""
        return [len(self.table), hashlib.sha256(self.table.tobytes()).hexdigest()]

    def blocks(self) -> list[str]:
        """Return a short checksum of each block of samples."""
        parts = (self.table[start : start + BLOCK] for start in range(0, len(self.table), BLOCK))
        return [hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in parts]

    def samples(self, block: int) -> list[str]:
        """Return numbers and description of each sample of a block."""
        indices = range(block * BLOCK, min(len(self.table), (block + 1) * BLOCK))
        return [json.dumps([self.table[index].tolist(), self.describe(index)]) for index in indices]


def image_parts(held: Mapping[str, Samples], names: Sequence[str], templates: Sequence[str]) -> dict[str, Part]:
    """Return the samples of image splits, class names and templates.

    A sample has a name relative to the dataset, a class, and the size or the pixels of the image.
    """
    parts = {f"{split} samples": _image_part(samples) for split, samples in held.items()}
    return parts | {name: word_part(words) for name, words in zip(TEXTS, (names, templates), strict=True)}


def word_part(names: Sequence[str]) -> Part:
    """Return names, such as class names."""
    table = np.array([zlib.crc32(word.encode("utf-8", "surrogateescape")) for word in names], dtype=np.int64)
    return Part(table.reshape(-1, 1), lambda index: repr(names[index]))


def _image_part(samples: Samples) -> Part:
    images = getattr(samples.images, "images", samples.images)  # behind a cache
    sizes = _sizes(images, samples.rows)

    def describe(index: int) -> str:
        size = f", {sizes[index]:,} bytes" if isinstance(images, FileImages) and sizes[index] else ""
        return f"{samples.keys[index]} (class {samples.labels[index]}{size})"

    return Part(np.stack([samples.numbers, samples.labels, sizes], axis=1), describe)


def _sizes(images: Any, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the size of each file, or a checksum of each array of pixels; 0 where neither is known at once."""
    sizes = np.zeros(len(rows), dtype=np.int64)
    if isinstance(images, ArrayImages):
        sizes[:] = [zlib.crc32(images.array[row].tobytes()) for row in rows]
    elif isinstance(images, FileImages):
        for index in range(0, len(rows), -(-len(rows) // _MOST_FILES) or 1):
            sizes[index] = _size(images.paths[int(rows[index])])
    return sizes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def text_part(columns: Mapping[str, NDArray[Any]], ends: NDArray[np.int64]) -> Part:
    """Return the samples of a split of texts.

    Args:
        columns: Numbers of all samples, one after another, or one number per sample.
        ends: int64 (samples + 1,), where each sample begins and ends.
    """
    count = len(ends) - 1
    table = np.zeros((count, len(columns)), dtype=np.int64)
    for place, column in enumerate(columns.values()):
        single = len(column) == count
        for index in range(count):
            piece = column[index : index + 1] if single else column[ends[index] : ends[index + 1]]
            table[index, place] = zlib.crc32(piece.tobytes())

    def describe(index: int) -> str:
        start, end = int(ends[index]), int(ends[index + 1])
        singles = [f", {name} {column[index]}" for name, column in columns.items() if len(column) == count]
        first = " ".join(map(str, columns["input_ids"][start : min(end, start + _MOST_TOKENS)]))
        return (
            f"a text of {end - start} tokens ({first}{' ...' if end - start > _MOST_TOKENS else ''}){''.join(singles)}"
        )

    return Part(table, describe)
