"""Length of a run: epochs or optimizer steps, whichever was set last."""

import re
from collections.abc import Mapping
from typing import Any

ALIASES = {"trainer.max_epochs": "data.epochs", "trainer.max_steps": "data.steps"}
"""Lightning's options of the length, and ours. A run is one Lightning epoch over all that it draws."""


def alias(option: str, value: object, other: Mapping[str, Any]) -> str:
    """Return our option for one of Lightning's, where both mean the same; any other option is returned unchanged.

    Beside a length of the data, ``max_steps`` is a limit, and 1 is the ``max_epochs`` of every run. Zero is always
    ours, which is refused.

    Args:
        option: Option, such as ``trainer.max_steps``.
        value: Its value, typed or from a config.
        other: Options given with it, by the same names.
    """
    positive = re.fullmatch(r"[1-9]\d*", str(value)) is not None
    alone = all(other.get(name) in (None, "null") for name in ALIASES.values())
    ours = (positive and alone) or str(value) == "0"
    return ALIASES[option] if option in ALIASES and ours else option


def with_our_length(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which the data's options have Lightning's place (see `alias`)."""
    trainer, data = tree.get("trainer"), tree.get("data") or {}
    if not (isinstance(trainer, dict) and isinstance(data, dict)):
        return dict(tree)
    for option in ALIASES:
        name = option.partition(".")[2]
        ours = alias(option, trainer.get(name), {f"data.{key}": value for key, value in data.items()})
        if ours != option:
            data = data | {ours.partition(".")[2]: trainer[name]}
            trainer = {key: value for key, value in trainer.items() if key != name}
    return {**tree, "trainer": trainer, **({"data": data} if data else {})}


def without_other_length(data: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return data options without the epochs (or steps) that later options replace by steps (or epochs).

    Args:
        data: Data options of a config, such as the resolved one of a run, which always has a length.
        later: Data options that override them; a typed null is still text.
    """
    replaced = {
        other
        for one, other in (("steps", "epochs"), ("epochs", "steps"))
        if later.get(one) not in (None, "null") and later.get(other) in (None, "null")
    }
    return {name: value for name, value in data.items() if name not in replaced}
