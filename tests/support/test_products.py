import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.products import covering, in_one_item


def test_covering_picks_a_part_in_which_any_two_values_meet() -> None:
    factors = [range(4), "ab", range(3), "xyz"]
    rows = covering(*factors)
    assert [row.values for row in rows] == list(itertools.product(*factors))
    picked = [row.values for row in rows if not row.marks]
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        assert {(row[i], row[j]) for row in picked} == set(itertools.product(first, second))
    assert len(picked) < 20 < len(rows)


def test_in_one_item_runs_every_row_with_a_folder_of_its_own(tmp_path: Path) -> None:
    failed: list[str] = []

    class Subtests:
        @contextmanager
        def test(self, msg: str) -> Iterator[None]:
            try:
                yield
            except AssertionError:
                failed.append(msg)

    @in_one_item(("number", "name"), [(1, "a"), (2, "b"), (3, "c"), (4, "d")])
    def odd(number: int, name: str, tmp_path: Path) -> None:
        assert not list(tmp_path.iterdir())
        (tmp_path / name).touch()
        assert number % 2

    assert list(inspect.signature(odd).parameters) == ["tmp_path", "subtests"]
    odd(subtests=Subtests(), tmp_path=tmp_path)
    assert failed == ["(2, 'b')", "(4, 'd')"] and len(list(tmp_path.glob("*/?"))) == 4
