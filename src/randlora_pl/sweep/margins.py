"""Rule by which a search has chosen rates, and the distance of these from rates that fail, by its record."""

from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from randlora_pl.sweep import RATES

NAMES = dict(zip(RATES, ("adapter rate", "head rate", "prompt rate"), strict=True))
POINTS = 10
BREAKS = f"A rate breaks if a run failed, its metric fell by more than {POINTS} points, or its loss doubled."
"""What `next_higher` counts as broken."""


def rule_text(record: Mapping[str, Any]) -> str:
    """Return what the rule ``lowest`` did in a search, as sentences."""
    trials, others, fewer = record["trials"], False, False
    for entry in record["methods"].values():
        names = [name for name in entry["chosen"] or () if name not in RATES]
        counts = Counter(tuple(each[name] for name in names) for each in entry["tried"])
        others, fewer = others or bool(names), fewer or min(counts.values(), default=trials) < trials
    several = max(len(record[axis]) for axis in ("seeds", "models", "datasets", "budgets")) > 1
    chosen = "Chosen: among the candidates within one standard error of the best, the lowest rates."
    return (
        f"Every method had {trials} trials{', or all rates of a shorter list' * fewer}"
        f"{' with each choice of the other options' * others}, from its own rates with seed {record['seeds'][0]}, and "
        f"its best {record['finalists']} ran with all seeds. "
        f"{chosen if several else 'One run of a candidate has no standard error, so the best was chosen.'}"
    )


def next_higher(record: Mapping[str, Any], method: str, option: str) -> tuple[str, str]:
    """Return how the next higher rate did, and at which one the method breaks, as texts.

    Args:
        record: What `tune` writes of a search.
        method: Label of a method.
        option: Name of the rate; the other options are the chosen ones. If none was chosen, the texts are empty.
    """
    entry: Mapping[str, Any] = record.get("methods", {}).get(method, {})
    chosen = entry.get("chosen") or {}
    if option not in chosen:
        return "", ""
    from randlora_pl.tasks.measures import Measure  # its package imports PyTorch

    monitor, measure = record["monitor"], Measure(**record["measure"])
    alike = [each for each in entry["tried"] if all(each[name] == chosen[name] for name in chosen if name != option)]
    own: Mapping[str, float] = next((each[monitor] for each in alike if each[option] == chosen[option]), {})
    text = breaks = ""
    for each in sorted(alike, key=lambda each: float(each[option])):
        if each[option] <= chosen[option]:
            continue
        seeds = [seed for seed in own if seed in each[monitor]]
        if "failed" in each or not seeds:
            shown, broken = "failed", True
        else:
            before, after = (fmean(metrics[seed] for seed in seeds) for metrics in (own, each[monitor]))
            change, form = (100 * (after - before), "+.1f") if measure.decimals is None else (after - before, "+.3f")
            shown, broken = f"{change:{form}}", after > 2 * before if measure.mode == "min" else change < -POINTS
        text = text or f"{each[option]:g}: {shown}"
        breaks = breaks or f"breaks at {each[option]:g}" * broken
    return text or "not tried", breaks or "none tried breaks"
