"""Warnings about missing classes in splits and classes of very different sizes."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

RATIO = 10
"""Minimum ratio of the largest to the smallest class for a warning."""


def remarks(
    labels: Mapping[str, NDArray[np.int64]], names: Sequence[str], unit: str = "images", balanced: bool = False
) -> list[str]:
    """Return one line about classes missing in splits, and one about training classes of very different sizes.

    ``labels`` has the class of each sample, by split; empty splits are ignored. ``balanced`` training corrects for
    different sizes.
    """
    counts = {split: np.bincount(found, minlength=len(names)) for split, found in labels.items() if len(found)}
    lines = []
    if lacking := {split: np.flatnonzero(count == 0) for split, count in counts.items() if (count == 0).any()}:
        parts = ", ".join(f"{len(empty)} in {split}" for split, empty in lacking.items())
        first = names[int(next(iter(lacking.values()))[0])]
        unseen = "; val/acc measures only the classes that val has" if "val" in lacking else ""
        lines.append(
            f"classes without {unit}: {parts} (of {len(names)} classes; the first: {first!r}){unseen}; add {unit}"
        )
    train = counts.get("train", np.zeros(0, dtype=np.int64))
    some = np.flatnonzero(train)
    if not balanced and len(some) and train[some].max() >= RATIO * train[some].min():
        low, high = int(some[train[some].argmin()]), int(train.argmax())
        sizes = f"{names[high]!r} has {train[high]:,} training {unit}, {names[low]!r} {train[low]:,}"
        lines.append(f"classes differ in size: {sizes}; accuracy favors the large ones, see --data.balance weights")
    return lines
