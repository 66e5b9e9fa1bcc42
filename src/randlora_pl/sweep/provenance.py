"""Provenance of a sweep's learning rates: the file that `tune` writes and that a sweep names as ``tuned``.

A method counts as tuned where it is the one that was searched and has the values that were chosen. Whatever was changed
since, the rate by hand or the rank, makes its rate one that was typed.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.options import misfit

Tree = dict[str, Any]

RATES = ("learning_rate", "head_learning_rate", "prompt_learning_rate")
"""Options with a learning rate."""

FILE = "tuning.json"
"""What `tune` writes."""

_SEARCH = (
    *("split", "monitor", "seeds", "finalists", "sampler", "trials", "pruner"),
    *("models", "datasets", "budgets", "set"),
)
"""Entries that describe the search; rates with equal entries were chosen by one rule."""
_LABELS = ("paper_name", "models", "family")
"""Entries of a method or model that do not change what is trained."""


def read_provenance(file: Path) -> Tree:
    """Return the content of a provenance file.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"tuned: {file} cannot be read ({error}). Name the {FILE} of a search.") from error
    return checked(content, str(file))


class _Method(TypedDict, total=False):
    method: Tree | None
    chosen: dict[str, Any] | None


class _Provenance(TypedDict):
    methods: dict[str, _Method]
    models: NotRequired[dict[str, Tree]]
    datasets: NotRequired[list[Any] | None]
    budgets: NotRequired[list[Any] | None]
    seeds: NotRequired[list[Any] | None]


def checked(content: Any, where: str) -> Tree:
    """Return a provenance; a UserError refuses anything else."""
    wrong = misfit(content, _Provenance)
    chosen = [] if wrong else [entry.get("chosen") or {} for entry in content["methods"].values()]
    if wrong or any(misfit(values.get(name, 1.0), float) for values in chosen for name in RATES):
        raise UserError(f"tuned: {where} does not describe how rates were chosen. Name the {FILE} that `tune` writes.")
    found: Tree = content
    return found


def rule_of(provenance: Mapping[str, Any]) -> str:
    """Describe the search as text: equal texts are one rule."""
    return json.dumps({name: provenance.get(name) for name in _SEARCH}, sort_keys=True)


def chosen_for(provenance: Mapping[str, Any], model: Tree, label: str, method: Tree) -> dict[str, float]:
    """Return the choice of the search for a method on a model; empty if it did not search this method or model."""
    entry = provenance.get("methods", {}).get(label, {})
    chosen: dict[str, float] = (entry.get("chosen") or {}) if provenance.get("finished") else {}
    searched = _essence(entry.get("method") or {}, chosen) == _essence(method, chosen)
    models = [_essence(facts, {}) for facts in provenance.get("models", {}).values()]
    same = all(_equal(_value(method, name), value) for name, value in chosen.items())
    return chosen if chosen and searched and same and _essence(model, {}) in models else {}


def joined(older: Tree, newer: Tree) -> Tree:
    """Both provenances where they are of one search, else the newer one."""
    if not older or not newer or rule_of(older) != rule_of(newer):
        return newer or older
    return newer | {"methods": older["methods"] | newer["methods"]}


def with_values(facts: Tree, values: Mapping[str, Any]) -> Tree:
    """Return a method with the values of a candidate; an option with a dot is one of its ``set``."""
    plain = {name: value for name, value in values.items() if "." not in name}
    dotted = {name: value for name, value in values.items() if "." in name}
    return facts | plain | ({"set": facts.get("set", {}) | dotted} if dotted else {})


def shown(values: Mapping[str, Any]) -> str:
    """Return a candidate as text."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in values.items())  # fmt: skip


def _value(facts: Tree, name: str) -> Any:
    return facts.get("set", {}).get(name) if "." in name else facts.get(name)


def _essence(facts: Mapping[str, Any], chosen: Mapping[str, Any]) -> Tree:
    left_out = {*_LABELS, *RATES, *chosen}
    kept = {key: value for key, value in facts.items() if key not in left_out}
    if isinstance(options := kept.get("set"), dict):
        kept["set"] = {name: value for name, value in options.items() if name not in chosen}
    return {key: value for key, value in kept.items() if value != {}}


def _equal(value: Any, other: Any) -> bool:
    numbers = isinstance(value, int | float) and isinstance(other, int | float)
    return math.isclose(value, other) if numbers else bool(value == other)
