"""Halves of a dataset's classes: base classes, which a model trains on, and new classes, which it is tested on."""

from dataclasses import replace

import numpy as np

from randlora_pl.data.readers.dispatch import Samples


def labels_of(count: int, half: str) -> range:
    """Return the labels of all of ``count`` classes, of the first half (``base``, rounded up) or the rest (``new``)."""
    middle = -(-count // 2)
    return {"all": range(count), "base": range(middle), "new": range(middle, count)}[half]


def of_half(samples: Samples, half: str) -> Samples:
    """Return the samples of half of the classes, with labels from 0; their order does not change."""
    if half == "all":
        return samples
    kept = labels_of(len(samples.classes), half)
    part = samples.subset(np.flatnonzero((samples.labels >= kept.start) & (samples.labels < kept.stop)))
    found = replace(part, labels=part.labels - kept.start, classes=samples.classes[kept.start : kept.stop])
    return found.numbered(part.numbers) if "numbers" in vars(part) else found
