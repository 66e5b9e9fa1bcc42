"""In-process cache of base models, tokenizers and text heads, for several runs in one process.

Off by default, because it costs the memory of one more base model. Only the last value of each kind is cached, so that
memory does not grow with the number of runs. Language models are not cached: a second copy of 8 billion parameters
takes 16 GB, and loading is a small part of their run time.
"""

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Value = TypeVar("Value")

_kept: dict[str, tuple[Hashable, Any]] | None = None


@contextmanager
def caching() -> Iterator[None]:
    """Enable `cached` and `cached_copy` inside the block."""
    global _kept
    before, _kept = _kept, {} if _kept is None else _kept
    try:
        yield
    finally:
        _kept = before


def cached(kind: str, key: Hashable, make: Callable[[], Value]) -> Value:
    """Return the value of ``make``: the same object for the same key, until another key of this kind is requested.

    The key is everything that determines the value, which callers must not modify.
    """
    if _kept is None:
        return make()
    if kind not in _kept or _kept[kind][0] != key:
        _kept.pop(kind, None)  # free the old value before the new one is built
        _kept[kind] = (key, make())
    value: Value = _kept[kind][1]
    return value


def cached_copy(kind: str, key: Hashable, make: Callable[[], Value]) -> Value:
    """Return a deep copy of the cached value of ``make``, which the caller may modify."""
    return make() if _kept is None else copy.deepcopy(cached(kind, key, make))
