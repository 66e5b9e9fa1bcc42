"""Distance of the rates that a search has chosen from those that fail, by its record."""

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from randlora_pl.sweep import RATES

if TYPE_CHECKING:
    from randlora_pl.tasks import Measure

NAMES = dict(zip(RATES, ("adapter rate", "head rate", "prompt rate"), strict=True))
CHOSEN = "Chosen: among the candidates within one standard error of the best, the lowest rates."
"""What the rule ``lowest`` does."""
POINTS = 10
BREAKS = f"A rate breaks if a run failed, its metric fell by more than {POINTS} points, or its loss doubled."
"""What `next_higher` counts as broken."""


def next_higher(entry: Mapping[str, Any], option: str, monitor: str, measure: "Measure") -> tuple[str, str]:
    """Return how the next higher rate did, and at which one the method breaks, as texts.

    Args:
        entry: What the record of a search has of a method.
        option: Name of the rate; the other options are the chosen ones.
        monitor: Metric of the search.
        measure: The same as tables show it: a fraction counts in points.
    """
    chosen = entry["chosen"]
    alike = [each for each in entry["tried"] if all(each[name] == chosen[name] for name in chosen if name != option)]
    own: Mapping[str, float] = next((each[monitor] for each in alike if each[option] == chosen[option]), {})
    higher = sorted((each for each in alike if each[option] > chosen[option]), key=lambda each: float(each[option]))
    texts, broken = [], []
    for each in higher:
        seeds = [seed for seed in own if seed in each[monitor]]
        if "failed" in each or not seeds:
            texts.append(f"{each[option]:g}: failed")
            broken.append(f"breaks at {each[option]:g}")
            continue
        before, after = (fmean(metrics[seed] for seed in seeds) for metrics in (own, each[monitor]))
        change, form = (100 * (after - before), "+.1f") if measure.decimals is None else (after - before, "+.3f")
        texts.append(f"{each[option]:g}: {change:{form}}")
        if after > 2 * before if measure.mode == "min" else change < -POINTS:
            broken.append(f"breaks at {each[option]:g}")
    return next(iter(texts), "not tried"), next(iter(broken), "none tried breaks")
