import itertools

from tests.support.products import covering


def test_covering_picks_a_part_in_which_any_two_values_meet() -> None:
    factors = [range(4), "ab", range(3), "xyz"]
    rows = covering(*factors)
    assert [row.values for row in rows] == list(itertools.product(*factors))
    picked = [row.values for row in rows if not row.marks]
    for (i, first), (j, second) in itertools.combinations(enumerate(factors), 2):
        assert {(row[i], row[j]) for row in picked} == set(itertools.product(first, second))
    assert len(picked) < 20 < len(rows)
