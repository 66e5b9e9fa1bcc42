"""Weights to adapt: their shapes, and patterns of their names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class WeightShape:
    """Shape of a weight to adapt: name of the layer, and (out, in) as in ``nn.Linear.weight``."""

    layer: str
    out_features: int
    in_features: int

    @property
    def large(self) -> int:
        """Larger side D."""
        return max(self.out_features, self.in_features)

    @property
    def small(self) -> int:
        """Smaller side d."""
        return min(self.out_features, self.in_features)


def sides(shapes: Sequence[WeightShape]) -> tuple[int, int]:
    """Return the largest output and the largest input of the layers."""
    return max(shape.out_features for shape in shapes), max(shape.in_features for shape in shapes)


def matches(pattern: str, layer: str) -> bool:
    """Return True if a regular expression matches a layer's full name, or the full part after any dot."""
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer) is not None


def by_pattern(values: Mapping[str, Number]) -> dict[str, Number]:
    """Return patterns of layer names with one number each."""
    groups: dict[Number, list[str]] = {}
    for layer, value in values.items():
        groups.setdefault(value, []).append(layer)
    return {f"^{exact_pattern(layers)}": value for value, layers in groups.items()}


def per_layer(values: Mapping[str, Number]) -> Number | dict[str, Number]:
    """Return one number, or patterns of layer names with one number each."""
    found = by_pattern(values)
    return next(iter(found.values())) if len(found) == 1 else found


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
