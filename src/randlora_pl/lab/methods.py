"""One table of the methods of a sweep on each dataset, beside plain classifiers."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from randlora_pl.lab.baselines import baselines_of, measured_with
from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.document import Table, row, table_lines
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.sections.training import shown_rate
from randlora_pl.lab.report.statistics import Estimate
from randlora_pl.sweep.description import ZERO_SHOT, is_zero_shot
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils.errors import UserError

log = logging.getLogger("randlora_pl")

_HEADER = ("method", "trained parameters", "learning rate", "chosen by", "accuracy, %", "seconds")
_NO_VERDICT = (
    "The order is the config's and not a ranking. A verdict needs rates that one search chose on validation "
    "images, five seeds and six datasets (randlora-pl sweep --tune, randlora-pl report)."
)


def method_tables(sweep: Sweep, cells: Sequence[Trial]) -> str:
    """Return Markdown: a table of each model, dataset and budget, in which no method is ranked.

    Cells without a result are left out.
    """
    shown = replace(sweep, cells=sweep.cells[sweep.cells["cell"].isin([cell.hash for cell in cells])])
    lines = []
    trained = [cell for cell in cells if not cell.untrained]
    for group in dict.fromkeys(cell.labels[:3] for cell in trained):
        model, dataset, budget = group
        rows = _plain(sweep, [cell for cell in trained if cell.labels[:3] == group])
        for method in sweep.plan.methods:
            key = Key(model, dataset, ZERO_SHOT if is_zero_shot(method) else budget, method)
            runs = shown.of(**key._asdict())
            if len(runs):
                seconds = runs["fit_seconds"][runs["fit_seconds"] > 0]
                rate, how = runs.iloc[0][["learning_rate", "rate_chosen_by"]]
                chosen = (shown_rate(rate), how) if isinstance(how, str) else ("-", "-")
                size = f"{count:,}" if (count := shown.parameters(model, method)) else "-"
                time = f"{seconds.median():.0f}" if len(seconds) else "-"
                rows.append([method, size, *chosen, _mean(shown.estimate(key)), time])
        caption = f"{model}, {dataset}, {budget}: test accuracy, mean ± standard error over seeds"
        lines += table_lines(Table("", caption, row(*_HEADER), [row(*cells) for cells in rows]))
    return "\n".join([*lines, _NO_VERDICT]) + "\n"


def _mean(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.mean:.1f}" + ("" if estimate.error is None else f" ± {estimate.error:.1f}")


def _plain(sweep: Sweep, cells: Sequence[Trial]) -> list[list[str]]:
    """Return rows of the plain classifiers, with the samples of each seed of these cells; none if one has an error."""
    known: dict[tuple[str, str, int], list[tuple[str, float]]] = {}
    for one in sweep.baselines:
        known.setdefault((one.dataset, one.budget, one.seed), []).append((one.name, one.score))
    found: dict[str, list[float]] = {}
    for cell in measured_with(cells):
        _, dataset, budget, _, seed = cell.labels
        try:
            rows = known.get((dataset, budget, seed)) or [(name, score) for name, score, *_ in baselines_of(cell)]
        except (UserError, OSError, ValueError) as error:
            log.warning("no baselines for %s: %s", dataset, error)
            return []
        for name, score in rows:
            found.setdefault(name, []).append(100 * score)
    return [[name, "-", "-", "-", _mean(Estimate(tuple(values))), "-"] for name, values in found.items()]
