"""Length of a run: epochs or optimizer steps, whichever was set last."""

from collections.abc import Mapping
from typing import Any


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
