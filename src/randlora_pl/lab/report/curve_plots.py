"""Plots of validation accuracy and training loss over the steps of the runs."""

from collections.abc import Sequence
from fractions import Fraction
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame, isna

from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.curves import VALIDATED, at, scores
from randlora_pl.lab.report.document import Picture, many
from randlora_pl.lab.report.plots import WIDTH, legend, style
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.sections.training import by_reference, kind_of_loss, logged_runs

_MOST = 8
"""Methods of a plot: of more the lines cannot be followed."""

Points = list[tuple[float, float]]


def curve_pictures(sweep: Sweep, model: str) -> list[Picture]:
    """Draw each reference with the methods that planned pairs join with it, or else with methods of its size."""
    pictures = []
    groups = by_reference(sweep, model)
    for reference, group in groups.items():
        methods = set(group)
        if sweep.plan.pairs:  # a method without such a loss would leave no run that all of them have
            kind = kind_of_loss(sweep, reference)
            alike = {m for other, found in groups.items() if kind_of_loss(sweep, other) == kind for m in found}
            methods = _joined(sweep.plan.pairs, reference) & alike
        others = [m for m in sweep.plan.methods if m in methods and m != reference]
        if others and (picture := _picture(sweep, model, reference, others[: _MOST - 1])):
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


def _picture(sweep: Sweep, model: str, reference: str, others: Sequence[str]) -> Picture | None:
    methods = [method for method in sweep.plan.methods if method in (reference, *others)]
    runs = logged_runs(sweep, model)
    runs = runs[runs["method"].isin(methods)]
    runs = runs[runs.groupby(["dataset", "budget", "seed"])["method"].transform("nunique") == len(methods)]
    if runs.empty:
        return None
    steps = set(runs["steps"].fillna(0))
    total = steps.pop() if len(steps) == 1 else 0
    panels = {f"validation {sweep.measured}, %": _of_scores(runs), "training loss": _of_losses(runs)}
    panels = {title: lines for title, lines in panels.items()
              if len(lines) == len(methods) and all(len(points) > 1 for points in lines.values())}  # fmt: skip
    if not panels:
        return None
    figure = Figure(figsize=(WIDTH, 2.3 * len(panels) + 0.4), layout="constrained")
    drawn = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    handles: list[Any] = []
    for panel, (title, lines) in zip(drawn, panels.items(), strict=True):
        handles = [
            panel.plot([x * (total or 100) for x, _ in lines[method]], [y for _, y in lines[method]], label=method,
                       markersize=3.5, **style(sweep, method))[0]
            for method in methods
        ]  # fmt: skip
        panel.set_ylabel(title)
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(5))
    drawn[-1].set_xlabel("steps" if total else "steps, % of the run")
    legend(figure, handles)
    chosen = "methods that planned pairs join with" if sweep.plan.pairs else "methods of about the size of"
    drawings, count = " and ".join(title.removesuffix(", %") for title in panels), runs["dataset"].nunique()
    caption = f"{model}: {drawings} against steps, with {chosen} {reference}. Means over {many(count, 'dataset')} "
    caption += "and the runs that all of these methods have; a loss is the mean of a part of a run."
    described = "; ".join(
        f"{method} {', '.join(f'{title} {_words(lines[method])}' for title, lines in panels.items())}"
        for method in methods
    )
    return Picture(f"curves-{identifier(model)}-{identifier(reference)}", caption, f"{described}.", figure)


def _words(points: Points) -> str:
    return f"from {points[0][1]:.3g} to {points[-1][1]:.3g}"


def _of_losses(runs: DataFrame) -> dict[str, Points]:
    """Return by method the share of the steps and the mean loss, after each part that all runs have."""
    parts = runs["losses"].map(len).min()
    shares = [Fraction(number, parts) for number in range(1, parts + 1)]
    return _over_datasets(runs, [{float(share): at(curve, share) for share in shares} for curve in runs["losses"]])


def _of_scores(runs: DataFrame) -> dict[str, Points]:
    """Return by method the share of the steps and the mean accuracy, where all runs of all methods validated."""
    curves = []
    for text, steps in zip(runs[VALIDATED], runs["steps"], strict=True):
        found = scores(text)
        total = max(found, default=0) if isna(steps) else steps
        curves.append({round(step / total, 3): value for step, value in found.items()} if total else {})
    shared = set.intersection(*(set(curve) for curve in curves))
    return _over_datasets(runs, [{share: curve[share] for share in sorted(shared)} for curve in curves])


def _over_datasets(runs: DataFrame, curves: Sequence[dict[float, Any]]) -> dict[str, Points]:
    """Return the mean of some curves over the runs of each dataset, and of these over datasets, by method."""
    values = DataFrame(curves, index=[runs["method"], runs["dataset"]])
    means = values.groupby(["method", "dataset"]).agg(fmean).groupby("method").agg(fmean)
    return {str(method): list(line.items()) for method, line in means.iterrows() if len(line)}
