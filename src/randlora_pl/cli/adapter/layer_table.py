"""Tables of values per layer, with one row for layers that differ in their block number only."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from randlora_pl.cli.common.tables import table


def layer_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], every: bool) -> str:
    """Return a plain table.

    Args:
        rows: Per layer ``layer``, ``shape`` and the values; None for a missing value.
        columns: Key and title of each value; a group of layers shows the mean, and the range of whole numbers.
        every: If True, one row per layer instead of one per group.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        name = row["layer"] if every else re.sub(r"\.\d+\.", ".*.", row["layer"])
        groups.setdefault((name, " x ".join(map(str, row["shape"]))), []).append(row)
    body = [
        [name, shape, str(len(members)), *(_cell([member.get(key) for member in members]) for key in columns)]
        for (name, shape), members in groups.items()
    ]
    return table(["layer", "out x in", "layers", *columns.values()], body)


def _cell(values: Sequence[Any]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if all(isinstance(value, int) for value in known):
        low, high = min(known), max(known)
        return str(low) if low == high else f"{low} to {high}"
    return f"{sum(known) / len(known):.4g}"
