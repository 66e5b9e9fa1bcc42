"""Interpretation of the user's labels and split names."""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from randlora_pl.utils.errors import UserError, near

ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
"""Accepted names of each split, in order of preference."""

SPLIT_OF = {alias: split for split, aliases in ALIASES.items() for alias in aliases}
"""Split of each accepted name."""

log = logging.getLogger("randlora_pl")


def source_split(split: str, there: Collection[str], where: object) -> str | None:
    """Return the user's split to read as ``split``, or None if it is to be held out from the train split.

    ``val`` without ``test`` is used as ``test``, because accuracy is reported on images not used for model selection;
    validation images then come from the train split.

    Args:
        split: ``train``, ``val`` or ``test``.
        there: Existing splits; an error if ``train`` is not among them.
        where: File or folder, for messages.
    """
    if "train" not in there:
        among = ", ".join(there) or "none"
        raise UserError(f"{where} has no train split among {among}, so there is nothing to train on")
    if "test" not in there and "val" in there and split != "train":
        if split == "val":
            return None
        log.warning("%s has no test split: its val split is used for testing", where)
        return "val"
    return split if split in there else None


def class_order(labels: Iterable[str], where: object) -> list[str]:
    """Return the distinct labels: whole numbers by value (also ``1.0``, as written by pandas), others alphabetically.

    One number in two notations is an error.
    """
    distinct = sorted(set(labels))
    if not all(re.fullmatch(r"-?[0-9]+(\.0+)?", label) for label in distinct):
        return distinct
    by_value: dict[int, str] = {}
    for label in distinct:
        value = int(label.partition(".")[0])
        if by_value.setdefault(value, label) != label:
            both = f"{by_value[value]!r} and {label!r}"
            raise UserError(f"{where}: the labels {both} are the same number; write it in one way")
    return [by_value[value] for value in sorted(by_value)]


def numbered(labels: Sequence[str], classes: Sequence[str], where: Callable[[int], str]) -> list[int]:
    """Return the index of each label among the classes of the train split; others are errors.

    ``where`` returns the position of the label with an index, for messages.
    """
    number = {name: index for index, name in enumerate(classes)}
    for index, label in enumerate(labels):
        if label not in number:
            raise UserError(
                f"{where(index)}: the class {label!r} is not in the train split.{near(label, classes)} "
                "Every class needs training images"
            )
    return [number[label] for label in labels]
