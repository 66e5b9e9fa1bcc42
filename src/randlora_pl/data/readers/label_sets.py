"""Several classes of one image: the cells of a user's table that list them, and the samples that they make."""

import itertools
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from randlora_pl.data.catalog import SEVERAL
from randlora_pl.data.readers import Samples, in_key_order, numbered
from randlora_pl.data.sources import Images
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import parse_json

Where = Callable[[int], str]
"""Function that returns the position of a row or an image, for messages."""


def classes_in(cell: str, where: str) -> list[str]:
    """Return the classes in a cell: separated by ``;`` or ``|``, or a list of JSON; an empty cell has none.

    Raises:
        UserError: The cell begins as JSON and is not such a list, or has a comma, which may separate or be in a name.
    """
    names: object = None if cell.startswith("[") or "," in cell else re.split(r"[;|]", cell)
    if cell.startswith("["):
        with suppress(ValueError):
            names = parse_json(cell)
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise UserError(f'{where}: {brief(cell)} is not a list of classes. Write cat;dog, or ["cat", "dog"]')
    return [name for name in map(str.strip, map(str, names)) if name]


def check_joined(labels: Sequence[str], where: Where) -> None:
    """Refuse labels that are other labels with ``;`` or ``|`` between them, in a table of one class for each image."""
    known = dict.fromkeys(labels)
    for label in known:
        parts = [part.strip() for part in re.split(r"[;|]", label)]
        if len(parts) > 1 and known.keys() >= {*parts}:
            position = where(labels.index(label))
            raise UserError(f"{position}: {label!r} has several labels. If an image may, name the column {SEVERAL!r}")


def known_classes(listed: Sequence[str | int] | None, names: Sequence[str] | None) -> list[str]:
    """Return the classes of a list of names or of numbers of ``names``; the Hub stores hidden ones as -1."""
    if names is None:
        return [str(each).strip() for each in listed or ()]
    return [names[int(each)] for each in listed or () if int(each) >= 0]


def classified(
    images: Images, listed: Sequence[Sequence[str]], keys: Sequence[str], classes: Sequence[str], where: Where
) -> Samples:
    """Return samples of one class each, in the order of their keys, from the arguments of `labelled`."""
    return in_key_order(images, numbered([label for (label,) in listed], classes, where), keys, classes)


def labelled(
    images: Images, listed: Sequence[Sequence[str]], keys: Sequence[str], classes: Sequence[str], where: Where
) -> Samples:
    """Return samples of several classes each, in the order of their keys; an image may have none.

    The label of a sample, by which splits are stratified, is the rarest of its classes here, or the number of classes
    if it has none.

    Args:
        images: Image source.
        listed: Names of the classes of each image.
        keys: Name of each image.
        classes: Names of all classes.
        where: Position of an image in its file.

    Raises:
        UserError: A class is unknown.
    """
    listed = [[*dict.fromkeys(names)] for names in listed]  # a dataset of boxes repeats a class for each
    owners = np.repeat(np.arange(len(listed)), [len(names) for names in listed])
    members = np.asarray(numbered([*itertools.chain(*listed)], classes, lambda place: where(owners[place])), np.int64)
    order = np.argsort(np.bincount(members, minlength=len(classes)), kind="stable")
    ranks = np.argsort(order)
    rarest = np.full(len(listed), len(classes))
    np.minimum.at(rarest, owners, ranks[members])
    samples = in_key_order(images, np.append(order, len(classes))[rarest], keys, classes)
    sets = csr_array((np.ones(len(members), dtype=np.bool_), (owners, members)), shape=(len(listed), len(classes)))
    sets.sort_indices()
    return replace(samples, sets=sets[samples.rows])
