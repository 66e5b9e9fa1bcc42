"""The report's numbers as CSV: every run, and every mean."""

from pandas import DataFrame

from randlora_pl.lab.report.cells import FINISHED, LABELS, METRIC, RIGHT, Sweep
from randlora_pl.lab.report.curves import TRAINED, VALIDATED
from randlora_pl.lab.report.document import Printed
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.sections.elsewhere import AFTER, BEFORE
from randlora_pl.lab.report.sections.new_classes import AFTER as NEW
from randlora_pl.lab.report.sections.paper_comparison import Beside
from randlora_pl.lab.report.statistics import Estimate
from randlora_pl.utils.text.tables import csv_text

_COLUMNS = (
    *("model", "family", "dataset", "budget", "method", "seed", "state", "reason", "accuracy", "zeroshot_accuracy"),
    *("learning_rate", "rate_chosen_by", "adapter", "task", "trainable_parameters", "total_parameters", "fit_seconds"),
    *("images_per_second", "samples_per_second", "peak_memory_bytes", "device", "steps", "version", "git_commit"),
)
_MACHINE = (METRIC, "machine", "cpu_threads", "version/python", "version/torch", TRAINED, VALIDATED)
"""Further columns, where any run has them."""
SPECTRUM = "spectrum/"
AVERAGE = "(average)"
"""Entry in place of the dataset for averages."""


def cells_csv(sweep: Sweep) -> str:
    """Return a line for every run, with or without a result; accuracies in percent."""
    known = [name for name, column in sweep.finished.items() if column.notna().any()]
    more = [*_MACHINE, *[RIGHT] * (len(sweep.plan.datasets) == 1)]  # tests of one dataset are paired by sample
    further = sorted(name for name in known if name.startswith((SPECTRUM, BEFORE, AFTER, NEW)))
    tests = list(dict.fromkeys(name for names in sweep.tests.values() for name in names))
    columns = [*_COLUMNS, *(name for name in more if name in known), *further, *tests, "cell"]
    cells = sweep.cells.assign(**{name: 100 * sweep.cells[name] for name in tests})
    return _csv(cells[[name for name in columns if name != f"{SPECTRUM}steps"]])


def summary_csv(sweep: Sweep) -> str:
    """Return a line for every cell, and for every average over datasets; accuracies in percent.

    ``ci95`` is half of the confidence interval of the mean. An empty field has no number, and ``state`` has the reason.
    """
    apart = sweep.by_test()
    beside = Beside(sweep.plan)
    rows: list[tuple[object, ...]] = []
    for key, runs in apart.runs.items():
        estimate, counts = apart.estimate(key), (len(apart.by_seed(key)), len(runs))
        state = FINISHED if estimate else apart.why_missing(key)
        size = apart.parameters(key.model, key.method)
        rows.append((*key, "", *counts, *_numbers(estimate, beside.cell(key)), size, state))
    for model in sweep.plan.models:
        for budget in apart.budgets(model):
            shared = apart.common(model, budget)[0]
            for method in apart.methods(model, budget):
                if average := apart.average(model, budget, method, shared):
                    labels = (*Key(model, AVERAGE, budget, method), " ".join(shared))
                    counts = len(average.seeds), len(average.all_seeds)
                    numbers = _numbers(average.estimate, beside.average(model, budget, method, shared))
                    rows.append((*labels, *counts, *numbers, apart.parameters(model, method), FINISHED))
    measured = ["datasets", "seeds", "seeds_planned", "mean", "std", "ci95", "paper", "difference"]
    return _csv(DataFrame(rows, columns=[*LABELS, *measured, "trainable_parameters", "state"]))


def _numbers(estimate: Estimate | None, paper: Printed | None) -> tuple[float | None, ...]:
    printed = paper.value if paper else None
    if estimate is None:
        return None, None, None, printed, None
    return estimate.mean, estimate.std, estimate.half, printed, None if printed is None else estimate.mean - printed


def _csv(table: DataFrame) -> str:
    """Return a table as CSV text: whole numbers as they are, others with six digits, nothing for a missing one."""
    values = table.convert_dtypes().astype(object)
    rows = values.where(values.notna(), None).to_numpy().tolist()
    return csv_text([list(table), *([f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows)])
