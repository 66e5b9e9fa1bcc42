"""Many cases in little time: a covering part of products runs by default, and short cases share one item."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]


def covering(*factors: Iterable[Any], strength: int = 2) -> list[Any]:
    """Return the product of the factors as parameters, all but a covering part marked `full`.

    In the part that stays unmarked, any values of any ``strength`` factors meet at least once: 1 is each value once,
    2 is pairwise testing. Rows are picked greedily, so that the same part is picked each time.
    """
    values = [list(factor) for factor in factors]
    rows = list(itertools.product(*(range(len(factor)) for factor in values)))
    meetings = {row: set(itertools.combinations(enumerate(row), strength)) for row in rows}
    missing = set().union(*meetings.values())
    picked = set()
    while missing:
        best = max(rows, key=lambda row: len(meetings[row] & missing))
        picked.add(best)
        missing -= meetings[best]
    order = iter(rows)
    return marked(itertools.product(*values), lambda _: next(order) in picked)


def marked(rows: Iterable[Any], by_default: Callable[[Any], bool], mark: Any = pytest.mark.full) -> list[Any]:
    """Return rows as parameters, those that do not run by default marked `full`, or otherwise."""
    return [pytest.param(*row, marks=[] if by_default(row) else [mark]) for row in rows]


def covered(names: tuple[str, ...], *factors: Iterable[Any], strength: int = 2) -> Callable[[Test], Test]:
    """Run the product of the factors as subtests of two items: a covering part, and the rest, marked `full`."""
    return in_two_items(names, covering(*factors, strength=strength))


def in_two_items(names: str | tuple[str, ...], rows: list[Any]) -> Callable[[Test], Test]:
    """Run parameters as `in_one_item` does, those of them that are `marked` as the subtests of a `full` item."""
    values = [(row.values[0] if isinstance(names, str) else row.values, bool(row.marks)) for row in rows]
    parts = [[row for row, mark in values if mark == rest] for rest in (False, True)]

    def decorate(test: Test) -> Test:
        runs = [in_one_item(names, part)(test) for part in parts]

        @functools.wraps(test)
        def run(rest: bool, **fixtures: Any) -> None:
            runs[rest](**fixtures)

        kept = inspect.signature(runs[0]).parameters.values()
        first = inspect.Parameter("rest", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = inspect.Signature([*kept, first])  # type: ignore[attr-defined]
        both = [pytest.param(rest, marks=[pytest.mark.full] if rest else []) for rest in (False, True) if parts[rest]]
        decorated: Test = pytest.mark.parametrize("rest", both)(run)
        return decorated

    return decorate


def in_one_item(names: str | tuple[str, ...], rows: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a test on each row within one item, as subtests: ``parametrize`` for cases of a few milliseconds.

    ``tmp_path`` is a new folder for each row and ``monkeypatch`` is undone after it; rows share all other fixtures.
    """
    keys = (names,) if isinstance(names, str) else names
    cases = [row if len(keys) > 1 else (row,) for row in rows]

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def run(subtests: pytest.Subtests, **fixtures: Any) -> None:
            if "subtests" in own.parameters:  # decorated twice
                fixtures["subtests"] = subtests
            shared = fixtures.copy()
            for number, case in enumerate(cases):
                with subtests.test(msg=repr(case)), pytest.MonkeyPatch.context() as patch:
                    if "tmp_path" in shared:
                        fixtures["tmp_path"] = shared["tmp_path"] / f"row{number}"
                        fixtures["tmp_path"].mkdir()
                    if "monkeypatch" in shared:
                        fixtures["monkeypatch"] = patch
                    if "capsys" in shared:
                        shared["capsys"].readouterr()
                    test(**fixtures, **dict(zip(keys, case, strict=True)))

        own = inspect.signature(test)
        kept = [parameter for name, parameter in own.parameters.items() if name not in (*keys, "subtests")]
        subtests = inspect.Parameter("subtests", inspect.Parameter.KEYWORD_ONLY)
        run.__signature__ = own.replace(parameters=[*kept, subtests])  # type: ignore[attr-defined]
        return run

    return decorate
