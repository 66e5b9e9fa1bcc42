"""Train, validation and test splits, few-shot and fraction subsets; all seeded and stratified.

Each sample's rank in its class is a pure function of (seed, its key): it depends neither on the order in which files
were found nor on other samples, so that adding or removing a file moves hardly any other between the splits.
Subsets with the same seed are nested: the first k shots are among the first k + 1.

The paths of a published draw start in a folder of its authors, so that an image is found by the end of its path.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from randlora_pl.data.readers import Samples
from randlora_pl.data.sources import Ints
from randlora_pl.utils import rng
from randlora_pl.utils.errors import UserError, brief, log
from randlora_pl.utils.files import disk_errors, parse_json, read_plain, write_text

SPLIT_SEED = 0
"""Seed of validation and test splits: fixed, so that all seeds are compared on the same images."""


def _ranks(labels: Ints, numbers: Ints, seed: int, name: str) -> Ints:
    """Return each sample's rank in a seeded order of its class, from 0."""
    pieces = torch.split(torch.from_numpy(numbers), 2**14)  # fit the cache: several times as fast for a million
    words = torch.cat([rng.words(seed, name, piece) for piece in pieces]).numpy()
    by_word = np.argsort(words)
    if (words[by_word[1:]] == words[by_word[:-1]]).any():  # very rare
        by_word = np.lexsort((numbers, words))
    short = labels[by_word].astype(np.min_scalar_type(labels.max(initial=0)))  # short, so that NumPy uses radix sort
    by_class = by_word[np.argsort(short, kind="stable")]
    counts = np.bincount(labels)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[by_class] = np.arange(len(labels)) - firsts
    return ranks


def _quotas(counts: Ints, total: int, ties: Ints, keep: int = 0) -> Ints:
    """Return ``total`` apportioned to ``counts`` by largest remainders, never more than a count.

    ``ties`` is the order of the classes that breaks ties. Rounding up leaves at least ``keep`` samples in a class, so
    that the sum may be below ``total``.
    """
    exact = counts * total  # in units of 1 / sum(counts), so that no rounding enters
    size = max(int(counts.sum()), 1)
    floors, remainders = exact // size, exact % size
    left = total - int(floors.sum())
    order = ties[np.argsort(-remainders[ties], kind="stable")]
    floors[order[floors[order] + 1 + keep <= counts[order]][:left]] += 1
    return np.asarray(floors, dtype=np.int64)


def stratified(labels: Ints, numbers: Ints, total: int, seed: int, name: str, keep: int = 0) -> Ints:
    """Return the sorted indices of ``total`` samples, each class represented in proportion by largest remainders.

    Args:
        labels: int64 (n,), class of each sample.
        numbers: int64 (n,), hash of each sample's key (`Samples.numbers`).
        total: Samples to choose.
        seed: Seed of the selection.
        name: Name of the random stream.
        keep: Minimum number left in a class when rounding up; fewer than ``total`` may then be chosen.
    """
    counts = np.bincount(labels)
    ties = rng.permutation(seed, f"{name}/ties", len(counts)).numpy()
    chosen = _ranks(labels, numbers, seed, name) < _quotas(counts, total, ties, keep)[labels]
    return np.flatnonzero(chosen).astype(np.int64)


def few_shot(labels: Ints, numbers: Ints, shots: int, seed: int) -> Ints:
    """Return the sorted indices of ``shots`` samples per class (all of a smaller class)."""
    return np.flatnonzero(_ranks(labels, numbers, seed, "shots") < shots).astype(np.int64)


def few_of(samples: Samples, shots: int, seed: int) -> Samples:
    """Return a few-shot subset; a sample may be chosen for any of its classes, so a class can have more samples."""
    owners, members = samples.pairs
    return samples.subset(np.unique(owners[few_shot(members, samples.numbers[owners], shots, seed)]))


def hold_out(samples: Samples, total: int, name: str) -> tuple[Samples, Samples]:
    """Split samples into (kept, held out), stratified by class, or by groups if there are any.

    ``total`` samples (or groups) are held out; at least one is kept. ``name`` is the random stream's.
    """
    kept, chosen = _parts(samples.labels, samples.numbers, samples.groups, total, SPLIT_SEED, name)
    return samples.subset(kept), samples.subset(chosen)


def _parts(labels: Ints, numbers: Ints, groups: Ints | None, total: int, seed: int, name: str) -> tuple[Ints, Ints]:
    if groups is None:  # keep: no class loses its only image
        chosen = stratified(labels, numbers, max(0, min(total, len(labels) - 1)), seed, name, keep=1)
    else:
        names, group = np.unique(groups, return_inverse=True)
        picked = stratified(np.zeros(len(names), dtype=np.int64), names, max(0, min(total, len(names) - 1)), seed, name)
        chosen = np.flatnonzero(np.isin(group, picked)).astype(np.int64)
    kept = np.ones(len(labels), dtype=np.bool_)
    kept[chosen] = False
    return np.flatnonzero(kept).astype(np.int64), chosen


def search_parts(
    labels: Ints, numbers: Ints, fraction: float, seed: int, groups: Ints | None = None
) -> tuple[Ints, Ints]:
    """Split a training set into indices for the weights and indices for what a search chooses, stratified by class.

    Args:
        labels: int64 (n,), class of each sample.
        numbers: int64 (n,), hash of each sample's key.
        fraction: Fraction for the search.
        seed: Seed of the run.
        groups: int64 (n,), groups that are not separated; the fraction is then of the groups.

    Raises:
        UserError: No sample can be held out.
    """
    units = len(labels) if groups is None else len(np.unique(groups))
    kept, chosen = _parts(labels, numbers, groups, max(1, int(fraction * units + 1e-9)), seed, "search")
    if not len(chosen):
        raise UserError(
            f"a search holds out training samples, but each class of {len(labels):,} has one. "
            "Use more of them (--data.shots 2 or more)."
        )
    return kept, chosen


def _units(samples: Samples) -> int:
    return len(samples) if samples.groups is None else len(np.unique(samples.groups))


class Splits:
    """Splits of a dataset, read on first access.

    Without a test split, 20 % (rounded up) of the train split are held out for it; without a validation split, 10 % of
    the rest (rounded down, at most 5,000). These are the counts of Table 7.

    Args:
        read: Function that reads one of the dataset's own splits, or returns None.
    """

    def __init__(self, read: Callable[[str], Samples | None]) -> None:
        self._read = cache(read)

    @cached_property
    def _own(self) -> tuple[Samples, Samples]:
        """Samples of (all but test, test)."""
        test, train = self._read("test"), self._read("train")
        if train is None:
            raise UserError("The dataset has no train split")
        return (train, test) if test is not None else hold_out(train, -(-_units(train) // 5), "test")

    @cached_property
    def _pool(self) -> tuple[Samples, Samples]:
        """Samples of (train, val); the latter may be empty for a tiny dataset."""
        val, pool = self._read("val"), self.full
        return (pool, val) if val is not None else hold_out(pool, min(_units(pool) // 10, 5_000), "val")

    def has(self, split: str) -> bool:
        """Return True if a split is the dataset's own, not held out from its train split."""
        return self._read(split) is not None

    @property
    def test(self) -> Samples:
        """Test samples."""
        test = self._read("test")
        return self._own[1] if test is None else test

    @property
    def train(self) -> Samples:
        """Training samples without validation samples."""
        return self._pool[0]

    @property
    def val(self) -> Samples:
        """Validation samples."""
        return self._pool[1]

    @property
    def full(self) -> Samples:
        """Complete train split of the dataset, including held-out validation samples."""
        return self._own[0]


def subset(
    samples: Samples, shots: int | None, fraction: float | None, seed: int, classnames: Sequence[str]
) -> Samples:
    """Return a few-shot or fraction subset; warn about classes with fewer than ``shots`` samples."""
    if shots is not None:
        counts = np.bincount(samples.pairs[1], minlength=len(classnames))
        short = np.flatnonzero(counts < shots)
        if len(short):
            log.warning(
                "%d of %d classes have fewer than %d images (%r has %d): all of their images are used",
                len(short), len(classnames), shots, classnames[short[0]], counts[short[0]],
            )  # fmt: skip
        return few_of(samples, shots, seed)
    if fraction is not None:
        total = max(1, int(fraction * len(samples) + 1e-9))
        return samples.subset(stratified(samples.labels, samples.numbers, total, seed, "fraction"))
    return samples


def write_index(path: Path, key: dict[str, Any], samples: Samples, classnames: Sequence[str]) -> None:
    """Write a subset as readable JSON: its key, and the sample keys of each class."""
    classes: dict[str, list[str]] = {name: [] for name in classnames}
    for index, label in zip(*(part.tolist() for part in samples.pairs), strict=True):
        classes[classnames[label]].append(samples.keys[index])
    alone = np.setdiff1d(np.arange(len(samples)), samples.pairs[0]).tolist()
    classes |= {"": [samples.keys[index] for index in alone]} if alone else {}  # without any class
    text = json.dumps({"key": key, "classes": classes}, indent=1) + "\n"
    with disk_errors(path, ""):
        write_text(path, text)


def read_index(path: Path, key: dict[str, Any], samples: Samples) -> Samples:
    """Return the subset listed in a file.

    Raises:
        UserError: The file is damaged, was made with other options, or lists missing samples.
    """
    try:
        loaded = parse_json(read_plain(path))
        key_of_file, classes = dict(loaded["key"]), [list(map(str, names)) for names in loaded["classes"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"The shots file {path} cannot be read ({error}). Delete it, or set another") from error
    different = [
        f"{name} is {key_of_file.get(name)!r}, not {key.get(name)!r}"
        for name in key | key_of_file
        if key_of_file.get(name) != key.get(name)
    ]
    if different:
        raise UserError(f"The shots file {path} belongs to another run: {'; '.join(different)}. Set another file")
    index = {name: number for number, name in enumerate(samples.keys)}
    wanted = [name for names in classes for name in names]
    wanted = wanted if samples.sets is None else list(dict.fromkeys(wanted))
    absent = [name for name in wanted if name not in index]
    if absent:
        raise UserError(f"The shots file {path} lists {absent[0]!r} and {len(absent) - 1} more that do not exist now")
    return samples.subset(np.sort(np.asarray([index[name] for name in wanted], dtype=np.int64)))


def evenly(count: int, most: int | None) -> list[int]:
    """Return at most ``most`` evenly spaced indices below ``count``; all of them for None."""
    if most is None or count <= most:
        return list(range(count))
    return [round(index) for index in np.linspace(0, count - 1, most).tolist()] if most else []


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
    return replace(part, labels=part.labels - kept.start, classes=samples.classes[kept.start : kept.stop])


def read_draw(path: Path, samples: Samples) -> Samples:
    """Return the samples that a draw lists, in key order; an image that is listed twice counts twice.

    Args:
        path: Draw. Its keys are ``path``, ``label`` and ``name``, or ``_impath``, ``_label`` and ``_classname``.
        samples: Training samples of all classes.

    Raises:
        UserError: The file is missing or damaged, or a line does not fit the samples.
    """
    try:
        content = read_plain(path, 1 << 26)  # 16 images of 1,000 classes take about 3 million bytes
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"The shots file {path} {why}") from error
    listed: dict[int, tuple[list[str], int]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, expected = f"{path}, line {number}", 'expected {"path": "CLASS/IMAGE.jpg", "label": 0, "name": "CLASS"}'
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where}: {brief(line)} is not JSON ({error}); {expected}") from error
        known = {name.lstrip("_"): value for name, value in entry.items()} if isinstance(entry, dict) else {}
        image, label = known.get("impath", known.get("path")), known.get("label")
        parts = [part for part in image.replace("\\", "/").split("/") if part] if isinstance(image, str) else []
        if not parts or not isinstance(label, int) or isinstance(label, bool):
            raise UserError(f"{where}: {brief(line)} has no path and label; {expected}")
        listed[number] = parts, label
    if not listed:
        raise UserError(f"The shots file {path} is empty")
    ends = {parts[-1] for parts, _ in listed.values()}
    places: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(samples.keys):
        end = key.rpartition("/")[2]
        if end in ends:
            places[end].append(index)
    chosen = [_found(f"{path}, line {number}", *line, samples, places) for number, line in listed.items()]
    return samples.subset(np.sort(np.asarray(chosen, dtype=np.int64)))


def _found(where: str, parts: Sequence[str], label: int, samples: Samples, places: dict[str, list[int]]) -> int:
    """Return the index of the sample whose key has the longest end in common with a path."""
    image = "/".join(parts[-3:])
    common = {}
    for index in places.get(parts[-1], ()):
        pairs = zip(reversed(samples.keys[index].split("/")), reversed(parts), strict=False)
        common[index] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    longest = [index for index, length in common.items() if length == max(common.values())]
    if not longest:
        raise UserError(
            f"{where}: {image!r} is not among the {len(samples):,} training images. "
            "The draw belongs to another dataset or split (--data.split coop?)"
        )
    if len(longest) > 1:
        some = " and ".join(repr(samples.keys[index]) for index in longest[:2])
        raise UserError(f"{where}: {image!r} fits {len(longest)} training images, such as {some}")
    own = int(samples.labels[longest[0]])
    if own != label:
        raise UserError(
            f"{where}: {image!r} has label {label}, but here {own} ({samples.classes[own]!r}). "
            "The draw belongs to another split (--data.split coop?)"
        )
    return longest[0]
