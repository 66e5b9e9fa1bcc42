import pytest

from randlora_pl.utils.text import group_names


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ({"a.0.fc": 3, "a.1.fc": 3, "fc": 3}, ["a.*.fc", "fc"]),
        ({"s.0.b.0.fc": 3, "s.0.b.1.fc": 3, "s.1.b.0.fc": 5, "s.2.b.0.fc": 5}, ["s.0.b.*.fc", "s.{1,2}.b.*.fc"]),
        ({"s.0.0.c": 1, "s.0.1.c": 2, "s.1.0.c": 3, "s.1.1.c": 4}, ["s.0.0.c", "s.0.1.c", "s.1.0.c", "s.1.1.c"]),
        ({"s.0.0.c": 1, **{f"s.0.{n}.c": 2 for n in range(1, 5)}}, ["s.*.0.c", "s.*.{1-4}.c"]),
        ({"0.1": 2, "1.1": 4}, ["0.1", "1.1"]),
    ],
)
def test_groups_of_other_shapes_keep_the_numbers_in_which_they_differ(
    names: dict[str, int], patterns: list[str]
) -> None:
    assert [name for name, _ in group_names(names.items())] == patterns
