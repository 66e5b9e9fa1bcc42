"""Title of a sweep, its names of models, methods and datasets, its seeds, remarks, and pairs of methods to test."""

from collections.abc import Iterable, Sequence
from typing import Any

from randlora_pl.utils.errors import UserError, near


def title(value: Any) -> str:
    """Return a title; a UserError refuses anything but text."""
    if not isinstance(value, str):
        raise UserError(f"title is {value!r}: give a heading in quotes.")
    return value


def check_labels(group: str, labels: Iterable[Any]) -> None:
    """Refuse names that no table can show, or that look like a path."""
    for label in map(str, labels):
        if not label.strip() or not label.isprintable() or label.startswith((".", "/", "~")) or ".." in label:
            raise UserError(f"{group} has the name {label!r}: give one of visible letters that is not a path.")


def planned_pairs(value: Any, trained: Sequence[str]) -> list[list[str]]:
    """Return pairs of trained methods; a UserError refuses anything else."""
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UserError(
            f"pairs is {value!r}: expected a list such as [[RandLoRA-6, LoRA-32]]. Put a name with a comma in quotes."
        )
    pairs = [[str(label) for label in pair] for pair in value]
    for first, second in pairs:
        for label in (first, second):
            if label not in trained:
                raise UserError(f"pairs has {label!r}, which is none of the trained methods.{near(label, trained)}")
        if first == second:
            raise UserError(f"pairs has {first!r} with itself: name two methods.")
    return pairs


def whole_numbers(name: str, values: Any) -> list[int]:
    """Return seeds; a UserError refuses anything but different whole numbers."""
    good = isinstance(values, list) and values
    if not good or any(isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < 2**32 for v in values):
        raise UserError(f"{name} is {values!r}: expected a list of whole numbers such as [1, 2, 3].")
    if twice := [value for n, value in enumerate(values) if value in values[:n]]:
        raise UserError(f"{name} has {twice[0]} twice: give each once.")
    return list(values)


def remarks(value: Any) -> list[str]:
    """Return the remarks on a sweep's runs; a UserError refuses anything but a list of sentences."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise UserError(f"notes is {value!r}: expected a list of sentences.")
    return value
