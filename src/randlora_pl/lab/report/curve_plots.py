"""Plots of validation accuracy and training loss over the steps of the runs."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from randlora_pl.lab.report.curves import at, losses, scores
from randlora_pl.lab.report.document import Picture, many
from randlora_pl.lab.report.plots import WIDTH, legend, style
from randlora_pl.lab.report.results import Results
from randlora_pl.lab.report.runs import FinishedRun
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.sections.training import by_reference, kind_of_loss

_MOST = 8
"""Methods of a plot: of more the lines cannot be followed."""

Points = list[tuple[float, float]]


def curve_pictures(results: Results, model: str) -> list[Picture]:
    """Draw each reference with the methods that planned pairs join with it, or else with methods of its size."""
    pictures = []
    groups = by_reference(results, model)
    for reference, group in groups.items():
        methods = set(group)
        if results.plan.pairs:  # a method without such a loss would leave no run that all of them have
            kind = kind_of_loss(results, reference)
            alike = {m for other, found in groups.items() if kind_of_loss(results, other) == kind for m in found}
            methods = _joined(results.plan.pairs, reference) & alike
        others = [m for m in results.plan.methods if m in methods and m != reference]
        if others and (picture := _picture(results, model, reference, others[: _MOST - 1])):
            left = len(others) - _MOST + 1
            picture.caption += f" The last {many(left, 'method')} of the sweep are left out." if left > 0 else ""
            pictures.append(picture)
    return pictures


def _joined(pairs: Sequence[Sequence[str]], method: str) -> set[str]:
    """Return the methods that pairs join with a method, by way of others, too."""
    found = {method}
    while more := {m for pair in pairs if found & set(pair) for m in pair} - found:
        found |= more
    return found


def _picture(results: Results, model: str, reference: str, others: Sequence[str]) -> Picture | None:
    methods = [method for method in results.plan.methods if method in (reference, *others)]
    runs = _shared(results, model, methods)
    cells = runs[reference]
    if not cells:
        return None
    every = [run for group in runs.values() for run in group.values()]
    steps = {run.number("steps") for run in every}
    total = steps.pop() if len(steps) == 1 else None
    parts = min(len(losses(run.facts)) for run in every)
    panels: dict[str, dict[str, Points]] = {
        f"validation {results.measured}, %": _of_scores(runs),
        "training loss": {m: _of_losses(list(group.values()), parts) for m, group in runs.items()},
    }
    panels = {title: lines for title, lines in panels.items() if all(len(points) > 1 for points in lines.values())}
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 2.3 * len(panels) + 0.4), layout="constrained")
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    handles: list[Any] = []
    for panel, (title, lines) in zip(drawn, panels.items(), strict=True):
        handles = [
            panel.plot([x * (total or 100) for x, _ in points], [y for _, y in points], label=method, markersize=3.5,
                       **style(results, method))[0]
            for method, points in lines.items()
        ]  # fmt: skip
        panel.set_ylabel(title)
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(5))
    drawn[-1].set_xlabel("steps" if total else "steps, % of the run")
    legend(figure, handles)
    count = len({dataset for dataset, _, _ in cells})
    chosen = "methods that planned pairs join with" if results.plan.pairs else "methods of about the size of"
    drawings = " and ".join(title.removesuffix(", %") for title in panels)
    caption = f"{model}: {drawings} against steps, with {chosen} {reference}. Means over {many(count, 'dataset')} "
    caption += "and the runs that all of these methods have; a loss is the mean of a part of a run."
    described = "; ".join(
        f"{method} {', '.join(f'{title} {_words(lines[method])}' for title, lines in panels.items())}"
        for method in methods
    )
    return Picture(f"curves-{identifier(model)}-{identifier(reference)}", caption, f"{described}.", figure)


def _words(points: Points) -> str:
    return f"from {points[0][1]:.3g} to {points[-1][1]:.3g}"


def _shared(
    results: Results, model: str, methods: Sequence[str]
) -> dict[str, dict[tuple[str, str, int | None], FinishedRun]]:
    """Return by method the runs with a logged loss, of the datasets, budgets and seeds that all of the methods have."""
    found: dict[str, dict[tuple[str, str, int | None], FinishedRun]] = {method: {} for method in methods}
    for run in results.sweep.finished:
        if run.key.model == model and run.key.method in found and losses(run.facts):
            found[run.key.method][run.key.dataset, run.key.budget, run.seed] = run
    shared = set.intersection(*(set(cells) for cells in found.values()))
    return {method: {place: run for place, run in cells.items() if place in shared} for method, cells in found.items()}


def _of_losses(runs: Sequence[FinishedRun], parts: int) -> Points:
    """Return share of the steps and mean loss over datasets, after each part."""
    shares = [Fraction(number, parts) for number in range(1, parts + 1)]
    return [
        (
            float(share),
            _over_datasets(
                runs, {id(run): value for run in runs if (value := at(losses(run.facts), share)) is not None}
            ),
        )
        for share in shares
    ]


def _of_scores(runs: Mapping[str, Mapping[Any, FinishedRun]]) -> dict[str, Points]:
    """Return share of the steps and mean accuracy over datasets, where all runs of all methods validated."""
    curves = {}
    for group in runs.values():
        for run in group.values():
            found = scores(run.facts)
            total = run.number("steps") or max(found, default=0)
            curves[id(run)] = {round(step / total, 3): value for step, value in found.items()} if total else {}
    shares = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    return {
        method: [
            (s, _over_datasets(list(group.values()), {key: curve[s] for key, curve in curves.items()})) for s in shares
        ]
        for method, group in runs.items()
    }


def _over_datasets(runs: Sequence[FinishedRun], values: Mapping[int, float]) -> float:
    found: dict[str, list[float]] = {}
    for run in runs:
        if id(run) in values:
            found.setdefault(run.key.dataset, []).append(values[id(run)])
    return fmean(fmean(group) for group in found.values())
