"""Differences of every method to one reference method: the matrix at the start of a report, and the conclusion."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.document import Table, TableCell, many, mean_cell, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.sections.pairwise_tests import COMPARABLE, LEVEL, Versus, reach
from randlora_pl.lab.report.statistics import Estimate, formatted, shown

_COLUMNS = 12
"""Largest number of datasets times budgets with a column for each; above it, a column is the mean over budgets."""
_HALF = 2.0
"""Points at which a cell has half of the full color."""


@dataclass(frozen=True)
class Reference:
    """A reference method of a model, and the pair of each other method with it, the other one first."""

    model: str
    method: str
    pairs: dict[str, Versus]


def references(sweep: Sweep, found: Sequence[Versus]) -> list[Reference]:
    """Return the reference of each model that has two methods to compare.

    It is the LoRA whose size is nearest to the first RandLoRA's, else full fine-tuning, else the first method.
    """
    chosen = []
    for model in sweep.plan.models:
        here = [one for one in found if one.model == model]
        methods = [m for m in sweep.plan.methods if any(m in (one.first, one.second) for one in here)]
        if methods:
            method = _reference(sweep, model, methods)
            pairs = {one.first if one.second == method else one.second: _with_second(one, method) for one in here
                     if method in (one.first, one.second)}  # fmt: skip
            chosen.append(Reference(model, method, {m: pairs[m] for m in methods if m in pairs}))
    return chosen


def _reference(sweep: Sweep, model: str, methods: Sequence[str]) -> str:
    target = next((sweep.parameters(model, m) for m in methods if sweep.is_randlora(m)), None) or 1

    def far(method: str) -> float:
        size = sweep.parameters(model, method) or 1
        return max(size / target, target / size)

    for kind in ("LoRA", "FullFineTuning"):
        if of_kind := [method for method in methods if sweep.kind(method) == kind]:
            return min(of_kind, key=far)
    return methods[0]


def _with_second(one: Versus, method: str) -> Versus:
    """Return a pair with a method in second place."""
    if one.second == method:
        return one
    cells = {labels: Estimate(tuple(-value for value in cell.values)) for labels, cell in one.cells.items()}
    crossed = one.crossed and replace(one.crossed, mean=-one.crossed.mean)
    return replace(one, first=one.second, second=one.first, ratio=1 / one.ratio, cells=cells, crossed=crossed)


def conclusion(sweep: Sweep, found: Sequence[Versus], compared: Sequence[Reference]) -> list[str]:
    """Return what the sweep shows: verdicts or the reason for none, and the difference that matters most."""
    planned = [one for one in found if one.planned]
    judged = [one for one in planned if one.p is not None]
    lacking = _without_runs(sweep, found)
    count = len(planned) + len(lacking)
    lines = []
    if judged:
        winners: dict[str, list[str]] = {}
        for one in judged:
            if one.p is not None and one.p < LEVEL:
                pair = (one.first, one.second) if one.difference.mean > 0 else (one.second, one.first)
                winners.setdefault(f"{one.model}: {pair[0]}", []).append(pair[1])
        held = reach(judged[0].only)
        lines += [f"{winner} is better than {', '.join(losers)}{held}." for winner, losers in winners.items()]
        better = sum(map(len, winners.values()))
        tested = f"{many(len(judged), 'pair')} of methods that could be tested"
        tested += f", of {count} planned" if sweep.plan.pairs else ""
        lines.append(
            f"A difference was found in {better} of the {tested} (adjusted p < {LEVEL:g})."
            if better
            else f"No difference was found in the {tested}{held}."
        )
    untuned = "the learning rates are not tuned (randlora-pl sweep CONFIG --tune searches them)"
    reasons = Counter(
        "; ".join(filter(None, (untuned if one.untuned else "", one.lacking))) for one in planned if one.obstacle
    )
    if (reasons or lacking) and not judged:
        lines.append("This sweep cannot show which method is more accurate.")
    pairs = many(count, "planned pair" if sweep.plan.pairs else "pair")
    lines += [f"No verdict for {number} of {pairs} of methods: {reason}." for reason, number in reasons.items()]
    lines += [
        f"No verdict for {first} against {second} on {model}: they have no finished training runs in common."
        for model, first, second in lacking
    ]
    if sweep.plan.pairs:
        return lines + [one.sentence() for one in planned]
    for here in compared:
        near = [one for one in here.pairs.values() if sweep.is_randlora(one.first) and one.similar(COMPARABLE)]
        lines += [one.sentence() for one in near[:1]]
    return lines


def _without_runs(sweep: Sweep, found: Sequence[Versus]) -> list[tuple[str, str, str]]:
    """Return the model and the methods of each planned pair that no finished runs compare."""
    compared = {(one.model, frozenset((one.first, one.second))) for one in found}
    planned = {(model, frozenset(pair)): (model, pair[0], pair[1])
               for model in sweep.plan.models for pair in sweep.plan.pairs
               if all(sweep.plan.trains(model, method) for method in pair)}  # fmt: skip
    return [labels for key, labels in planned.items() if key not in compared]


def matrix_table(sweep: Sweep, here: Reference) -> Table:
    """Return methods by datasets and budgets, each cell colored by its difference to the reference."""
    budgets = sweep.trained_budgets(here.model)
    every = [(d, b) for d in sweep.plan.datasets for b in budgets]
    every = [labels for labels in every if any(labels in one.cells for one in here.pairs.values())]
    apart = len(every) <= _COLUMNS
    columns = every if apart else list(dict.fromkeys((dataset, "") for dataset, _ in every))
    rows = []
    for method, one in here.pairs.items():
        cells = [_cell(sweep, here, one, labels, apart) for labels in columns]
        size, mean = sweep.parameters(here.model, method), mean_cell(one.difference, form="+.2f")
        rows.append(row(method, size, mean, _verdict(one), *cells))
    titles = [TableCell(dataset, below=budget or "mean over budgets") for dataset, budget in columns]
    below = [
        f"Each number is the {sweep.measured} of the method minus the {sweep.measured} of the reference, in "
        "points, paired by seed. Blue is higher and orange is lower. The color shows the size of a "
        "difference and is not a verdict. "
        + ("Below it is half the 95 % confidence interval over seeds. " if apart else "")
        + f"The interval of the mean is over {_units(here)}. The verdict comes from the paired test."
    ]
    return Table(
        f"matrix-{identifier(here.model)}",
        f"{here.model}: difference to {here.method}, points",
        row("Method", "Trained parameters", "Mean difference", "Verdict", *titles),
        rows,
        below,
    )


def _units(here: Reference) -> str:
    return "test samples and seeds" if any(one.crossed for one in here.pairs.values()) else "datasets"


def _cell(sweep: Sweep, here: Reference, one: Versus, labels: tuple[str, str], apart: bool) -> TableCell:
    dataset, budget = labels
    found = {b: cell for (d, b), cell in one.cells.items() if d == dataset and budget in ("", b)}
    if not found:
        lacking = [Key(here.model, dataset, budget, name) for name in (one.first, one.second)] if budget else []
        why = next((sweep.why_missing(key) for key in lacking if key not in sweep.accuracies), "no common seed")
        return TableCell("-", title=why, missing=True)
    value = one.by_dataset[dataset] if not budget else found[budget].mean
    half = found[budget].half if apart else None
    title = "; ".join(f"{b}: {shown(cell, '+.2f')} over {many(len(cell.values), 'seed')}" for b, cell in found.items())
    below = "" if half is None else f"± {half:.1f}"
    return TableCell(formatted(value), below, title, value, tint=value / (abs(value) + _HALF))


def _verdict(one: Versus) -> TableCell:
    if one.p is None:
        short = one.obstacle if not one.planned else "not tuned" if one.untuned else "no verdict"
        return TableCell(short, title=one.obstacle)
    differs, higher = one.p < LEVEL, one.difference.mean > 0
    text = ("better" if higher else "worse") if differs else "no difference found"
    return TableCell(text, f"p = {one.p:.2g}", best=differs and higher, sort=one.p)
