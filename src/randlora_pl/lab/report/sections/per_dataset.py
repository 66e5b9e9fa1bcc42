"""Runs that have several tests, taken apart: each test becomes a dataset of its own, as in the paper's tables."""

from collections import Counter
from dataclasses import replace

from randlora_pl.lab.report.collect import Sweep
from randlora_pl.lab.report.runs import PREFIX, FinishedRun
from randlora_pl.language.datasets.commonsense import TASKS


def tests_of(sweep: Sweep) -> dict[str, list[str]]:
    """Return the names of the tests of each dataset, in the paper's order; datasets of a single test are left out."""
    found: dict[str, list[str]] = {}
    for dataset in sweep.plan.datasets:
        metrics = [name for run in sweep.finished if run.key.dataset == dataset for name in run.facts]
        names = [name.removeprefix(PREFIX) for name in dict.fromkeys(metrics) if name.startswith(PREFIX)]
        if names:
            found[dataset] = sorted(names, key=lambda name: list(TASKS).index(name) if name in TASKS else len(TASKS))
    return found


def by_test(sweep: Sweep) -> Sweep:
    """Return the same sweep with every test in place of its dataset; a run is there once for each of its tests.

    A run without a result stands under every test that the finished ones have. A name that two datasets have
    is followed by the dataset's label.
    """
    tests = tests_of(sweep)
    if not tests:
        return sweep
    titles = {name: TASKS[name].title if name in TASKS else name for names in tests.values() for name in names}
    count = Counter(title for names in tests.values() for title in (titles[name] for name in names))
    columns = {
        dataset: {name: title if count[title := titles[name]] == 1 else f"{dataset} {title}" for name in names}
        for dataset, names in tests.items()
    }
    datasets = [column for d in sweep.plan.datasets for column in (columns[d].values() if d in columns else [d])]
    runs = [one for run in sweep.runs for one in _apart(run, columns.get(run.key.dataset, {}))]
    return replace(sweep, plan=replace(sweep.plan, datasets=datasets), runs=runs)


def _apart(run: FinishedRun, columns: dict[str, str]) -> list[FinishedRun]:
    found = []
    for name, column in columns.items():
        value = run.number(PREFIX + name) if run.accuracy is not None else None
        zero = run.facts.get(PREFIX + name) == 0 and run.accuracy is not None
        key = run.key._replace(dataset=column)
        found.append(replace(run, key=key, accuracy=100 * value if value is not None else 0.0 if zero else None))
    return found or [run]
