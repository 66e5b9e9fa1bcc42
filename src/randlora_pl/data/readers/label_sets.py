"""Several classes of one image: the cells of a user's table that list them, and the samples that they make."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from randlora_pl.data.catalog import SEVERAL
from randlora_pl.data.readers import Samples, in_key_order, numbered
from randlora_pl.data.sources import Images
from randlora_pl.utils.errors import UserError, brief
from randlora_pl.utils.files import parse_json

ANSWERS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
"""Accepted cells of a column for one class, in lower case."""

MARK = "="
"""Prefix of the name of a column that may be a class."""

Where = Callable[[int], str]
"""Function that returns the position of a row or an image, for messages."""


def classes_in(cell: str, where: str) -> list[str]:
    """Return the classes in a cell: separated by ``;`` or ``|``, or a list of JSON; an empty cell has none.

    Label Studio writes several choices as ``{"choices": [...]}``.

    Raises:
        UserError: The cell begins as JSON and is not such a list, or has an empty name.
    """
    names: object = re.split(r"[;|]", cell) if cell else []
    if cell.startswith(("[", "{")):
        try:
            names = parse_json(cell)
        except ValueError:
            names = None
        names = names.get("choices") if isinstance(names, dict) else names
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise UserError(f'{where}: {brief(cell)} is not a list of classes. Write cat;dog, or ["cat", "dog"]')
    stripped = [str(name).strip() for name in names]
    if "" in stripped:
        raise UserError(f"{where}: {brief(cell)} has a class without a name. Remove the separator beside it")
    return stripped


def several_in(columns: Mapping[str, Sequence[str]], where: Where) -> tuple[list[list[str]], list[str]] | None:
    """Return the classes of each row of a table, and of its columns if each is a class (with `MARK`).

    None stands for a table of one label a row, also if its first row shows that the columns are not classes.
    """
    if SEVERAL in columns:
        return [classes_in(cell, where(row)) for row, cell in enumerate(columns[SEVERAL])], []
    marks = {name.removeprefix(MARK): cells for name, cells in columns.items() if name.startswith(MARK)}
    if not marks or any(cells[0].lower() not in ANSWERS for cells in marks.values()):
        return None
    return marked_classes(marks, where), [*marks]


def marked_classes(columns: Mapping[str, Sequence[str]], where: Where) -> list[list[str]]:
    """Return the classes of each row of a table that has a column of 0 and 1 for each class.

    Args:
        columns: Cells of each class.
        where: Position of a row in its file.

    Raises:
        UserError: A cell is neither.
    """
    listed: list[list[str]] = [[] for _ in next(iter(columns.values()))]
    for name, cells in columns.items():
        for row, cell in enumerate(cells):
            if cell.lower() not in ANSWERS:
                what = f"the column {name!r} has {brief(cell)}, expected 0 or 1"
                raise UserError(f"{where(row)}: {what}: without a column of labels, each other column is a class")
            if ANSWERS[cell.lower()]:
                listed[row].append(name)
    return listed


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
        UserError: A class is unknown, or listed twice for an image.
    """
    for row, names in enumerate(listed):
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{where(row)}: the class {twice!r} is listed twice. Remove one")
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
