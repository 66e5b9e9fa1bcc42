"""Compact storage of many strings in one block of bytes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Strings(Sequence[str]):
    """Strings created on access. They load and pickle fast, and forked processes share them.

    Attributes:
        raw: uint8, the UTF-8 bytes of all strings; file names that are not UTF-8 keep their bytes.
        starts: int64 (n,), start of each string in ``raw``.
        ends: int64 (n,), end of each string.
    """

    raw: NDArray[np.uint8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Strings":
        """Build from strings."""
        joined = "".join(texts)
        if joined.isascii():  # one byte per character
            block, lengths = joined.encode(), map(len, texts)
        else:
            parts = [text.encode("utf-8", "surrogateescape") for text in texts]
            block, lengths = b"".join(parts), map(len, parts)
        sizes = np.fromiter(lengths, np.int64, len(texts))
        ends = np.cumsum(sizes)
        return cls(np.frombuffer(block, np.uint8), ends - sizes, ends)

    def take(self, indices: NDArray[np.int64]) -> "Strings":
        """Return the strings at the given indices; the bytes are shared."""
        return Strings(self.raw, self.starts[indices], self.ends[indices])

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Strings": ...
    def __getitem__(self, index: int | slice) -> "str | Strings":
        """Return the string at an index."""
        if isinstance(index, slice):
            return Strings(self.raw, self.starts[index], self.ends[index])
        return self.raw[self.starts[index] : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        whole = self.raw.tobytes()
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield whole[start:end].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # compared by content, and holds arrays
