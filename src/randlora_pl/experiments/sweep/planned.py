"""Pairs of methods that a sweep plans to test."""

from collections.abc import Sequence
from typing import Any

from randlora_pl.utils.errors import UserError, near


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
