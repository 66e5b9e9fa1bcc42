"""Short names for groups of layers whose names differ in numbers alone."""

import re
from collections.abc import Hashable, Iterable

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


def star(name: str) -> str:
    """Return a layer's name with a star in place of each number that a dot follows.

    Examples:
        >>> star("layers.0.1.mlp.fc1")
        'layers.*.*.mlp.fc1'
    """
    return _NUMBER.sub("*", name)


def group_names(names: Iterable[tuple[str, Hashable]]) -> dict[tuple[str, Hashable], list[int]]:
    """Return the positions of each group by its pattern and kind; groups of one kind and pattern belong together.

    Groups of another kind with the same pattern keep the numbers in which they differ.

    Args:
        names: Name and kind of each layer, such as its shape.

    Examples:
        >>> list(group_names([("a.0.b.0.fc", 3), ("a.0.b.1.fc", 3), ("a.1.b.0.fc", 5)]))
        [('a.0.b.*.fc', 3), ('a.1.b.*.fc', 5)]
    """
    listed = list(names)
    groups: dict[tuple[str, Hashable], list[int]] = {}
    for position, (name, kind) in enumerate(listed):
        groups.setdefault((star(name), kind), []).append(position)
    numbers = {key: _numbers(listed[position][0] for position in positions) for key, positions in groups.items()}
    found = {}
    for (pattern, kind), positions in groups.items():
        together = [own for key, own in numbers.items() if key[0] == pattern]
        words = _words(numbers[pattern, kind], list(zip(*together, strict=True)))
        alone = len(positions) == 1 and len(together) == 1
        shown = listed[positions[0]][0] if alone else "".join(_alternate(pattern.split("*"), words))
        found[shown, kind] = positions
    return found


def _words(own: list[list[int]], places: list[tuple[list[int], ...]]) -> list[str]:
    """Return a star or numbers for each place of a group; ``places`` has the numbers of all groups of the pattern."""
    apart = [place for place, sets in enumerate(places) if len(set().union(*sets)) == sum(map(len, sets))]
    differ = apart[:1] or [place for place, sets in enumerate(places) if any(each != sets[0] for each in sets)]
    shown = differ if len(places) and len(places[0]) > 1 else []
    return [_listed(values) if place in shown else "*" for place, values in enumerate(own)]


def _alternate(texts: list[str], words: list[str]) -> list[str]:
    return [part for pair in zip(texts, [*words, ""], strict=True) for part in pair]


def _numbers(names: Iterable[str]) -> list[list[int]]:
    """Return the numbers at each place of names of one pattern, sorted."""
    places = zip(*(_NUMBER.findall(name) for name in names), strict=True)
    return [sorted(set(map(int, values))) for values in places]


def _listed(values: list[int]) -> str:
    """Return numbers as text: ``3``, ``{0,2}`` or ``{1-5}``."""
    if len(values) == 1:
        return str(values[0])
    whole = len(values) > 2 and values[-1] - values[0] == len(values) - 1
    return f"{{{values[0]}-{values[-1]}}}" if whole else f"{{{','.join(map(str, values))}}}"
