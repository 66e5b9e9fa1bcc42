"""Speed of training: steps and time to the final loss of a reference, and the loss on the way."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import log
from statistics import fmean

from randlora_pl.lab.report.curves import at, losses, reached
from randlora_pl.lab.report.document import Table, TableCell, row
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.results import Results
from randlora_pl.lab.report.runs import FinishedRun
from randlora_pl.lab.report.sections.accuracy import identifier
from randlora_pl.lab.report.statistics import Estimate

_SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(1))
_REFERENCES = ("LoRA", "FullFineTuning")

Pairs = dict[str, list[tuple[FinishedRun, FinishedRun]]]
"""By dataset: a run of a method, and the run of its reference with the same budget and seed."""


def training_table(results: Results, model: str) -> Table | None:
    """Return the steps and time to the final loss of a reference; None where no two methods logged such a loss."""
    found = {method: reference for reference, group in by_reference(results, model).items() for method in group}
    rows = []
    for method in filter(found.__contains__, results.plan.methods):
        if pairs := _pairs(results, model, method, found[method]):
            rows.append(_row(method, found[method], pairs))
    if len(rows) < 2:
        return None
    header = row(
        *("Method", "Reference", "Steps to its loss, %", "Not reached", "Time to its loss, %", "Time of a run, %"),
        *(f"Loss at {share}" if share < 1 else "Loss at the end" for share in _SHARES),
    )
    below = [
        "The reference of a method is the LoRA with the nearest number of parameters and the same kind of loss, or "
        "full fine-tuning if no LoRA was run. A run is cut into 16 equal parts, or fewer with at least 5 steps, and "
        "its loss in a part is the mean of those that it logged. It reaches the loss of the reference after the first "
        "part that is not above the last part of the reference. A run that never does counts as 100 %. The row of a "
        "reference itself shows what noise does.",
        "Losses are differences to the reference after an eighth, a quarter and a half of the steps and at the end, "
        "paired by dataset, budget and seed. Times are percents of the whole run of the reference. All are means over "
        "datasets with 95 % confidence intervals.",
    ]
    caption = f"{model}: training loss beside a reference"
    return Table(f"training-{identifier(model)}", caption, header, rows, below=below, left=2)


def by_reference(results: Results, model: str) -> dict[str, list[str]]:
    """Return the references of a model, each with the methods whose mark is its loss, itself among them."""
    methods = [m for m in results.plan.methods if _logged(results, model, m)]
    found: dict[str, list[str]] = {}
    for method in methods:
        if reference := _reference(results, model, method, methods):
            found.setdefault(reference, []).append(method)
    return found


def _row(method: str, reference: str, pairs: Pairs) -> list[TableCell]:
    def share(ours: FinishedRun, theirs: FinishedRun) -> Fraction | None:
        return reached(losses(ours.facts), losses(theirs.facts)[-1])

    def steps(ours: FinishedRun, theirs: FinishedRun) -> float:
        return 100 * float(share(ours, theirs) or 1)

    def run_time(ours: FinishedRun, theirs: FinishedRun) -> float | None:
        seconds, base = (run.number("fit_seconds") for run in (ours, theirs))
        return 100 * seconds / base if seconds and base and ours.device == theirs.device else None

    def time(ours: FinishedRun, theirs: FinishedRun) -> float | None:
        whole = run_time(ours, theirs)
        return None if whole is None else steps(ours, theirs) * whole / 100

    def difference(when: Fraction) -> Callable[[FinishedRun, FinishedRun], float | None]:
        def of(ours: FinishedRun, theirs: FinishedRun) -> float | None:
            here, there = at(losses(ours.facts), when), at(losses(theirs.facts), when)
            return None if here is None or there is None else here - there

        return of

    every = [both for group in pairs.values() for both in group]
    never = sum(share(*both) is None for both in every)
    return row(
        method,
        "itself" if method == reference else reference,
        _mean(pairs, steps, "{:.0f}"),
        TableCell(f"{never} of {len(every)}", sort=never / len(every)),
        _mean(pairs, time, "{:.0f}"),
        _mean(pairs, run_time, "{:.0f}"),
        *(TableCell("") if method == reference else _mean(pairs, difference(s), "{:+.3f}", "{:.3f}") for s in _SHARES),
    )


def _mean(
    pairs: Pairs, value: Callable[[FinishedRun, FinishedRun], float | None], form: str, spread: str = ""
) -> TableCell:
    """Return a mean over datasets, of their means over budgets and seeds, with its interval."""
    found = {d: [v for both in group if (v := value(*both)) is not None] for d, group in pairs.items()}
    means = {dataset: fmean(values) for dataset, values in found.items() if values}
    return mean_cell(means, form, spread or form)


def mean_cell(means: Mapping[str, float], form: str, spread: str, nothing: str = "not measured") -> TableCell:
    """Return the mean of values by dataset with its interval, and each value as the tooltip."""
    if not means:
        return TableCell(nothing, missing=True)
    estimate = Estimate(tuple(means.values()))
    half = "" if estimate.half is None else f" ± {spread.format(estimate.half)}"
    title = "; ".join(f"{dataset} {form.format(mean)}" for dataset, mean in means.items())
    return TableCell(f"{form.format(estimate.mean)}{half}", "", title, estimate.mean)


def _pairs(results: Results, model: str, method: str, reference: str) -> Pairs:
    found: Pairs = {}
    for dataset in results.plan.datasets:
        for budget in results.trained_budgets(model):
            theirs = {run.seed: run for run in results.finished(Key(model, dataset, budget, reference))}
            for run in results.finished(Key(model, dataset, budget, method)):
                other = theirs.get(run.seed)
                if other and losses(run.facts) and losses(other.facts):
                    found.setdefault(dataset, []).append((run, other))
    return found


def _logged(results: Results, model: str, method: str) -> bool:
    runs = results.sweep.finished
    return any(losses(run.facts) for run in runs if (run.key.model, run.key.method) == (model, method))


def _reference(results: Results, model: str, method: str, methods: list[str]) -> str | None:
    """Return the method whose loss is the mark of another one, the method itself if it is such a mark."""
    size, loss = results.parameters(model, method), kind_of_loss(results, method)
    alike = [one for one in methods if kind_of_loss(results, one) == loss]
    for kind in _REFERENCES:
        sizes = {one: n for one in alike if results.kind(one) == kind and (n := results.parameters(model, one))}
        if sizes and size:
            return min(sizes, key=lambda one: (abs(log(sizes[one] / size)), one != method))
    return None


def kind_of_loss(results: Results, method: str) -> tuple[object, ...]:
    """Return what must be equal for two training losses to be comparable: the task and its options of the loss."""
    tasks = sorted({str(run.facts.get("task")) for run in results.sweep.finished if run.key.method == method})
    options: Mapping[str, object] = results.plan.fact("methods", method).get("set") or {}
    return tasks, sorted((name, str(value)) for name, value in options.items() if name.startswith("model.loss"))
