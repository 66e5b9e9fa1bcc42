"""What one process needs again and again, kept between runs: base models, tokenizers, text heads.

Off by default, because it costs the memory of one more base model. Only the last of each kind is kept, so that memory
stays flat however many runs follow. Language models are not kept: a second copy of 8 billion parameters takes 16 GB,
and reading them again a small part of what their runs take.
"""

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Value = TypeVar("Value")

_kept: dict[str, tuple[Hashable, Any]] | None = None


@contextmanager
def caching() -> Iterator[None]:
    """Within it `kept` and `pristine` keep what they make."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def cached(kind: str, key: Hashable, make: Callable[[], Value]) -> Value:
    """What ``make`` makes, the same object for the same key while nothing else of its kind is asked for.

    Args:
        kind: Names what is kept; one value of each kind is.
        key: Everything that decides the value.
        make: Makes it. Nobody may change what it makes.
    """
    if _kept is None:
        return make()
    if kind not in _kept or _kept[kind][0] != key:
        _kept.pop(kind, None)  # before the new one takes its memory
        _kept[kind] = (key, make())
    value: Value = _kept[kind][1]
    return value


def cached_copy(kind: str, key: Hashable, make: Callable[[], Value]) -> Value:
    """A copy of what ``make`` makes, bit for bit, that may be changed at will."""
    return make() if _kept is None else copy.deepcopy(cached(kind, key, make))
