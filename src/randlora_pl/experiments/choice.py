"""Which candidates of a search are the best: one rule for every search."""

from collections.abc import Mapping
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Any)


def best_of(scores: Mapping[Key, float], count: int) -> list[Key]:
    """The best candidates, the best first; of equal ones the lowest.

    Args:
        scores: The higher the better.
        count: How many.
    """
    return sorted(scores, key=lambda key: (-scores[key], key))[:count]
