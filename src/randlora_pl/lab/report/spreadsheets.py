"""The report's numbers as CSV: every run, and every mean."""

from collections.abc import Sequence

from randlora_pl.lab.paper import PaperCell
from randlora_pl.lab.report.collect import FINISHED, Sweep
from randlora_pl.lab.report.curves import TRAINED, VALIDATED
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.results import Results
from randlora_pl.lab.report.runs import METRIC, PREFIX, RIGHT
from randlora_pl.lab.report.sections.elsewhere import AFTER, BEFORE
from randlora_pl.lab.report.sections.new_classes import AFTER as NEW
from randlora_pl.lab.report.sections.paper_comparison import Beside, PaperAverage
from randlora_pl.lab.report.sections.per_dataset import by_test, tests_of
from randlora_pl.lab.report.sections.rates import Rates
from randlora_pl.lab.report.statistics import Estimate
from randlora_pl.sweep.description import is_zero_shot
from randlora_pl.utils.text.tables import csv_text

_FACTS = (
    *("method", "task", "trainable_parameters", "total_parameters", "fit_seconds", "images_per_second"),
    *("samples_per_second", "peak_memory_bytes", "device", "steps", "version", "git_commit"),
)
"""Metrics of ``results.json``; ``method`` is called ``adapter``, for the label of the method has that name."""
_MACHINE = (METRIC, "machine", "cpu_threads", "version/python", "version/torch", TRAINED, VALIDATED)
"""Further facts, in columns where any run has them."""
SPECTRUM = "spectrum/"
AVERAGE = "(average)"
"""Entry in place of the dataset for averages."""


def cells_csv(sweep: Sweep) -> str:
    """Return a line for every run, with or without a result; accuracies in percent."""
    tests = [PREFIX + name for name in dict.fromkeys(name for names in tests_of(sweep).values() for name in names)]
    kinds = (SPECTRUM, BEFORE, AFTER, NEW)
    metrics = {name for run in sweep.finished for name in run.facts if name.startswith(kinds) and run.number(name)}
    further, rates = sorted(metrics - {f"{SPECTRUM}steps"}), Rates(Results(sweep))
    more = [*_MACHINE, *[RIGHT] * (len(sweep.plan.datasets) == 1)]  # tests of one dataset are paired by sample
    facts = [*_FACTS, *(name for name in more if any(name in run.facts for run in sweep.finished))]
    header = ["model", "family", "dataset", "budget", "method", "seed", "state", "reason", "accuracy"]
    header += ["zeroshot_accuracy", "learning_rate", "rate_chosen_by"]
    header += ["adapter" if name == "method" else name for name in facts]
    rows = []
    for run in sweep.runs:
        trained = run.accuracy is not None and not is_zero_shot(run.key.method)
        rate = rates.rate(run) if trained else None
        rows.append([
            *(run.key.model, run.family, run.key.dataset, run.key.budget, run.key.method),
            *(run.seed, run.state, run.reason, run.accuracy, run.zeroshot),
            *((rate.value, rate.how) if rate else (None, None)),
            *(run.facts.get(name) for name in facts),
            *(run.number(name) for name in further),
            *(100 * value if isinstance(value := run.facts.get(name), float) else None for name in tests),
            run.cell,
        ])  # fmt: skip
    return _csv([*header, *further, *tests, "cell"], rows)


def summary_csv(sweep: Sweep) -> str:
    """Return a line for every cell, and for every average over datasets; accuracies in percent.

    ``ci95`` is half of the confidence interval of the mean. An empty field has no number, and ``state`` has the reason.
    """
    apart = by_test(sweep)
    results, beside = Results(apart), Beside(sweep.plan)
    rows: list[Sequence[object]] = []
    for key in dict.fromkeys(run.key for run in apart.runs):
        estimate, paper = results.estimate(key), beside.cell(key)
        state = FINISHED if estimate else results.why_missing(key)
        counts = (len(results.finished(key)), len(results.runs(key)))
        size = results.parameters(key.model, key.method)
        rows.append([*key, "", *counts, *_numbers(estimate, paper), size, state])
    for model in sweep.plan.models:
        for budget in results.budgets(model):
            shared = tuple(results.common(model, [budget])[0])
            for method in results.methods(model, budget):
                group, size = (model, budget, method), results.parameters(model, method)
                if average := results.average(*group, shared):
                    counts = (len(average.seeds), len(average.all_seeds))
                    numbers = _numbers(average.estimate, beside.average(*group, shared))
                    labels = Key(model, AVERAGE, budget, method)
                    rows.append([*labels, " ".join(shared), *counts, *numbers, size, FINISHED])
    header = ["model", "dataset", "budget", "method", "datasets", "seeds", "seeds_planned", "mean", "std", "ci95"]
    return _csv([*header, "paper", "difference", "trainable_parameters", "state"], rows)


def _numbers(estimate: Estimate | None, paper: PaperCell | PaperAverage | None) -> tuple[float | None, ...]:
    printed = paper.value if paper else None
    if estimate is None:
        return None, None, None, printed, None
    return estimate.mean, estimate.std, estimate.half, printed, None if printed is None else estimate.mean - printed


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return csv_text([header, *([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)])
