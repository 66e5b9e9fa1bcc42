"""Short regular expressions that match exactly the given layer names."""

import re
from collections.abc import Iterable


def exact_pattern(names: Iterable[str]) -> str:
    r"""Return a regular expression whose full matches are exactly these names.

    Examples:
        ``blocks.0.fc1 blocks.1.fc1 blocks.0.fc2 blocks.1.fc2`` give ``blocks\.(?:0|1)(?:\.fc1|\.fc2)``.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(|.*?\.)(\d+)(\..*)", name)
        before, number, after = found.groups() if found else (name, "", "")
        numbers.setdefault((before, after), []).append(number)
    ends: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (before, after), own in numbers.items():
        ends.setdefault((before, tuple(own)), []).append(after)
    return _any(re.escape(before) + _any(own) + _any(map(re.escape, after)) for (before, own), after in ends.items())


def _any(patterns: Iterable[str]) -> str:
    choices = list(patterns)
    return choices[0] if len(choices) == 1 else f"(?:{'|'.join(choices)})"
