"""Train, validation and test samples; few-shot and fraction subsets; all seeded and stratified.

Each sample's place in a class is a pure function of (seed, its key): it depends neither on the order in which
files were found nor on what else there is, so that a file more or less moves hardly any other between the splits.
Subsets of one seed are nested: the first k shots are among the first k + 1.
"""

import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from randlora_pl.data.readers.dispatch import Samples
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.cache_folder import write_whole
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.plain_files import read_plain

SPLIT_SEED = 0
"""Seed of validation and test splits: the same for every run, so that seeds are compared on the same images."""

INDEX_VERSION = 1

log = logging.getLogger("randlora_pl")


def _ranks(labels: NDArray[np.int64], numbers: NDArray[np.int64], seed: int, name: str) -> NDArray[np.int64]:
    """Place of each sample in a seeded order of its class: 0 for the first of its class, 1 for the second ..."""
    pieces = torch.split(torch.from_numpy(numbers), 2**14)  # fit the cache: several times as fast on a million
    words = torch.cat([rng.words(seed, name, piece) for piece in pieces]).numpy()
    by_word = np.argsort(words)
    if (words[by_word[1:]] == words[by_word[:-1]]).any():  # next to never
        by_word = np.lexsort((numbers, words))
    short = labels[by_word].astype(np.min_scalar_type(labels.max(initial=0)))  # so short that NumPy sorts by digits
    by_class = by_word[np.argsort(short, kind="stable")]
    counts = np.bincount(labels)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - firsts
    return ranks


def quotas(counts: NDArray[np.int64], total: int, ties: NDArray[np.int64], keep: int = 0) -> NDArray[np.int64]:
    """``total`` shared out in proportion to ``counts`` by largest remainders, never more than a count.

    Args:
        counts: int64 (classes,), samples of each class.
        total: Samples to choose, from 0 to the sum of the counts.
        ties: An order of the classes; of equal remainders the first in it wins.
        keep: Rounding up leaves at least this many of a class, so that the sum may stay below ``total``.
    """
    exact = counts * total  # in units of 1 / sum(counts), so that no rounding enters
    size = max(int(counts.sum()), 1)
    floors, remainders = exact // size, exact % size
    left = total - int(floors.sum())
    order = ties[np.argsort(-remainders[ties], kind="stable")]
    floors[order[floors[order] + 1 + keep <= counts[order]][:left]] += 1
    return np.asarray(floors, dtype=np.int64)


def stratified(
    labels: NDArray[np.int64], numbers: NDArray[np.int64], total: int, seed: int, name: str, keep: int = 0
) -> NDArray[np.int64]:
    """Places of ``total`` samples, each class represented in proportion, in ascending order (see `quotas`).

    Args:
        labels: int64 (n,), class of each sample.
        numbers: int64 (n,), what stands for each sample's key (`Samples.numbers`).
        total: Samples to choose.
        seed: Selects them.
        name: Names the random stream.
        keep: See `quotas`.
    """
    counts = np.bincount(labels)
    ties = rng.permutation(seed, f"{name}/ties", len(counts)).numpy()
    chosen = _ranks(labels, numbers, seed, name) < quotas(counts, total, ties, keep)[labels]
    return np.flatnonzero(chosen).astype(np.int64)


def few_shot(labels: NDArray[np.int64], numbers: NDArray[np.int64], shots: int, seed: int) -> NDArray[np.int64]:
    """Places of ``shots`` samples of each class (all of a class that has fewer), in ascending order."""
    return np.flatnonzero(_ranks(labels, numbers, seed, "shots") < shots).astype(np.int64)


def set_aside(samples: Samples, total: int, name: str) -> tuple[Samples, Samples]:
    """Splits samples into (kept, set aside), stratified over classes, or over groups where there are some.

    Args:
        samples: What to split.
        total: Samples (or groups) to set aside.
        name: Names the random stream.
    """
    if samples.groups is None:
        chosen = stratified(
            samples.labels, samples.numbers, total, SPLIT_SEED, name, keep=1
        )  # no class loses its only image
    else:
        names, group = np.unique(samples.groups, return_inverse=True)
        picked = stratified(np.zeros(len(names), dtype=np.int64), names, total, SPLIT_SEED, name)
        chosen = np.flatnonzero(np.isin(group, picked)).astype(np.int64)
    kept = np.ones(len(samples), dtype=np.bool_)
    kept[chosen] = False
    return samples.subset(np.flatnonzero(kept)), samples.subset(chosen)


def _units(samples: Samples) -> int:
    """Samples, or groups where there are some."""
    return len(samples) if samples.groups is None else len(np.unique(samples.groups))


class Splits:
    """The three splits of a data set, read when first asked for.

    A data set without a test split gives 20 % (rounded up) of its train split to it; one without a validation
    split gives 10 % of what then remains (rounded down, at most 5,000), which are the counts of Table 7.

    Args:
        read: Reads one of the data set's own splits, None where it has no such split.
    """

    def __init__(self, read: Callable[[str], Samples | None]) -> None:
        self._read = read

    @cached_property
    def _own_test(self) -> Samples | None:
        return self._read("test")

    @cached_property
    def _own(self) -> tuple[Samples, Samples]:
        """(all but test, test)."""
        test, train = self._own_test, self._read("train")
        if train is None:
            raise UserError("The data set has no train split")
        return (train, test) if test is not None else set_aside(train, -(-_units(train) // 5), "test")

    @cached_property
    def _pool(self) -> tuple[Samples, Samples]:
        """(train, val)."""
        val, pool = self._own_val, self._own[0]
        return (pool, val) if val is not None else set_aside(pool, min(_units(pool) // 10, 5_000), "val")

    @cached_property
    def _own_val(self) -> Samples | None:
        return self._read("val")

    @property
    def own_val(self) -> bool:
        """Whether the validation samples are the data set's own, and not taken out of its train split."""
        return self._own_val is not None

    @property
    def own_test(self) -> bool:
        """Whether the test samples are the data set's own."""
        return self._own_test is not None

    @property
    def train(self) -> Samples:
        """Training samples without validation samples."""
        return self._pool[0]

    @property
    def val(self) -> Samples:
        """Validation samples; may be empty for a tiny data set."""
        return self._pool[1]

    @property
    def test(self) -> Samples:
        """Test samples; a test split of the data set's own needs no training images."""
        return self._own[1] if self._own_test is None else self._own_test

    @property
    def full(self) -> Samples:
        """All the data set's own train split, with the validation samples that were taken from it."""
        return self._own[0]


def index_key(dataset: str, shots: int | None, fraction: float | None, train_split: str, seed: int) -> dict[str, Any]:
    """What determines a subset; stored with it."""
    return {
        "dataset": dataset,
        "shots": shots,
        "fraction": fraction,
        "train_split": train_split,
        "seed": seed,
        "version": INDEX_VERSION,
    }


def subset(
    samples: Samples, shots: int | None, fraction: float | None, seed: int, classnames: Sequence[str]
) -> Samples:
    """Few-shot or fractional subset; warns about classes with fewer than ``shots`` samples."""
    if shots is not None:
        counts = np.bincount(samples.labels, minlength=len(classnames))
        short = np.flatnonzero(counts < shots)
        if len(short):
            log.warning(
                "%d of %d classes have fewer than %d images (%r has %d): all of theirs are used",
                len(short), len(classnames), shots, classnames[short[0]], counts[short[0]],
            )  # fmt: skip
        return samples.subset(few_shot(samples.labels, samples.numbers, shots, seed))
    if fraction is not None:
        total = max(1, int(fraction * len(samples) + 1e-9))
        return samples.subset(stratified(samples.labels, samples.numbers, total, seed, "fraction"))
    return samples


def write_index(path: Path, key: dict[str, Any], samples: Samples, classnames: Sequence[str]) -> None:
    """Writes a subset as readable JSON: its key, and the sample keys of each class."""
    classes: dict[str, list[str]] = {name: [] for name in classnames}
    for label, name in zip(samples.labels.tolist(), samples.keys, strict=True):
        classes[classnames[label]].append(name)
    text = json.dumps({"key": key, "classes": classes}, indent=1) + "\n"
    try:
        write_whole(path, lambda stream: stream.write(text.encode("utf-8")))
    except OSError as error:
        raise UserError(f"The shots file {path} cannot be written: {error.strerror}") from error


def has_key(path: Path, key: dict[str, Any]) -> bool:
    """Whether a file holds a subset that was chosen by these options; false also where it cannot be read."""
    try:
        found: bool = parse_json(path.read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found


def read_index(path: Path, key: dict[str, Any], samples: Samples) -> Samples:
    """The subset that a file lists.

    Raises:
        UserError: The file is damaged, was made for another key, or lists samples that the data set lacks.
    """
    try:
        loaded = parse_json(read_plain(path))
        found, classes = dict(loaded["key"]), [list(map(str, names)) for names in loaded["classes"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The shots file {path} cannot be read ({error}): delete it, or name another") from error
    different = [f"{name} is {found.get(name)!r}, not {key[name]!r}" for name in key if found.get(name) != key[name]]
    if different:
        raise UserError(f"The shots file {path} is of another run: {'; '.join(different)}. Name another file")
    place = {name: number for number, name in enumerate(samples.keys)}
    wanted = [name for names in classes for name in names]
    absent = [name for name in wanted if name not in place]
    if absent:
        raise UserError(f"The shots file {path} lists {absent[0]!r} and {len(absent) - 1} more that are not there now")
    return samples.subset(np.sort(np.asarray([place[name] for name in wanted], dtype=np.int64)))
