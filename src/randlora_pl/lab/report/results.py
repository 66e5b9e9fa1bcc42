"""Cells with their seeds, and averages over datasets that are fair to every method."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from randlora_pl.lab.report.collect import FAILED, NOT_RUN, Sweep
from randlora_pl.lab.report.plan import Key
from randlora_pl.lab.report.runs import METRIC, RIGHT, FinishedRun
from randlora_pl.lab.report.statistics import Estimate
from randlora_pl.sweep.description import ZERO_SHOT, is_zero_shot
from randlora_pl.utils.text.packed_bits import unpacked

CORRELATIONS = {"pearson": "Pearson × 100", "matthews": "Matthews × 100"}
"""Metrics of labelled texts other than accuracy, and how reports show them."""


@dataclass(frozen=True)
class Average:
    """Accuracy over some datasets.

    Attributes:
        estimate: Percent; one value for each seed in ``seeds``, or one value where these are fewer than two.
        seeds: The seeds that all of these datasets have.
        all_seeds: The seeds that any of them has.
    """

    estimate: Estimate
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    all_seeds: tuple[int, ...]


class Results:
    """The runs of a sweep by cell."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep, self.plan = sweep, sweep.plan
        self._runs: dict[Key, list[FinishedRun]] = defaultdict(list)
        for run in sweep.runs:
            self._runs[run.key].append(run)
        self.average = cache(self._average)

    @cached_property
    def metrics(self) -> dict[str, str]:
        """Return the metric of each dataset whose metric is not the accuracy."""
        found = ((run.key.dataset, str(run.facts.get(METRIC))) for run in self.sweep.finished)
        return {dataset: CORRELATIONS[metric] for dataset, metric in found if metric in CORRELATIONS}

    @property
    def measured(self) -> str:
        """Return the name of what the tests measure in percent."""
        return "accuracy or correlation" if self.metrics else "accuracy"

    def runs(self, key: Key) -> list[FinishedRun]:
        """Return every run of a cell, planned or found."""
        return self._runs.get(key, [])

    def finished(self, key: Key) -> list[FinishedRun]:
        """Return the runs with an accuracy."""
        return [run for run in self.runs(key) if run.accuracy is not None]

    def by_seed(self, key: Key) -> dict[int, float]:
        """Accuracy of each finished seed in percent."""
        runs = self.finished(key)
        return {run.seed: run.accuracy for run in runs if run.seed is not None and run.accuracy is not None}

    def right(self, key: Key) -> dict[int, NDArray[np.bool_]]:
        """Return which test samples each finished seed classified correctly, for the seeds that recorded it."""
        found = {run.seed: unpacked(run.facts.get(RIGHT)) for run in self.finished(key) if run.seed is not None}
        return {seed: values for seed, values in found.items() if values is not None}

    def estimate(self, key: Key) -> Estimate | None:
        """Mean over the finished seeds; None without one."""
        values = tuple(self.by_seed(key).values())
        return Estimate(values) if values else None

    def untrained(self, model: str, dataset: str) -> float | None:
        """Accuracy of the pretrained model in percent; None if nothing measured it."""
        keys = [Key(model, dataset, ZERO_SHOT, method) for method in filter(is_zero_shot, self.plan.methods)]
        tested = [accuracy for key in keys for accuracy in self.by_seed(key).values()]
        found = tested or [run.zeroshot for key, runs in self._runs.items() if key[:2] == (model, dataset)
                           for run in runs if run.zeroshot is not None]  # fmt: skip
        return fmean(found) if found else None

    def idle(self, key: Key) -> bool:
        """Return True if a trained cell does not differ from the pretrained model, which lies within its interval."""
        estimate, zero = self.estimate(key), self.untrained(key.model, key.dataset)
        if key.budget == ZERO_SHOT or estimate is None or estimate.half is None or zero is None:
            return False
        return abs(estimate.mean - zero) <= estimate.half

    def why_missing(self, key: Key) -> str:
        """Return the reason that a cell without a result shows; the reason of a failure comes first."""
        runs = self.runs(key)
        failed = [run for run in runs if run.state == FAILED]
        others = [run for run in runs if run.state != NOT_RUN]
        return (failed or others)[0].status if failed or others else NOT_RUN

    def methods(self, model: str, budget: str) -> list[str]:
        """Return the methods with a finished run, in order."""
        found = {key.method for key in self._runs if (key.model, key.budget) == (model, budget) and self.finished(key)}
        return [method for method in self.plan.methods if method in found]

    def budgets(self, model: str) -> list[str]:
        """Return the budgets of a model's runs, in order; the pretrained model's as well."""
        return [b for b in self.plan.budgets if any(k.model == model and k.budget == b for k in self._runs)]

    def trained_budgets(self, model: str) -> list[str]:
        """Return the budgets without the pretrained model's."""
        return [budget for budget in self.budgets(model) if budget != ZERO_SHOT]

    def common(self, model: str, budgets: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
        """Return the datasets that every compared method has at every one of some budgets.

        A method without any finished run at a budget is not compared there: its own cell shows the reason.

        Returns:
            The datasets; and of each that is left out, the methods that lack it.
        """
        shared, left_out = [], {}
        compared = [(budget, method) for budget in budgets for method in self.methods(model, budget)]
        for dataset in self.plan.datasets:
            cells = [Key(model, dataset, *labels) for labels in compared]
            lacking = list(dict.fromkeys(key.method for key in cells if not self.finished(key)))
            if not any(self.runs(key) for key in cells):  # of other models only
                continue
            if lacking:
                left_out[dataset] = lacking
            else:
                shared.append(dataset)
        return shared, left_out

    def _average(self, model: str, budget: str, method: str, datasets: tuple[str, ...]) -> Average | None:
        """Return the mean over datasets; None where one of them has no finished run.

        Averaged seed by seed, over the seeds that all of these datasets have, so that the interval is one over seeds.
        With fewer than two such seeds it is the mean of the cells' means, without an interval.
        """
        cells = [self.by_seed(Key(model, dataset, budget, method)) for dataset in datasets]
        if not cells or not all(cells):
            return None
        shared = sorted(set.intersection(*(set(cell) for cell in cells)))
        every = tuple(sorted({seed for cell in cells for seed in cell}))
        if len(shared) > 1:
            values = tuple(fmean(cell[seed] for cell in cells) for seed in shared)
        else:
            values = (fmean(fmean(cell.values()) for cell in cells),)
        return Average(Estimate(values), datasets, tuple(shared), every)

    def parameters(self, model: str, method: str) -> int | None:
        """Trained parameters: of the runs with the most common number, since a linear head's differs by dataset.

        None without a finished run.
        """
        if is_zero_shot(method):  # its runs may count what could train
            return 0
        found = [run.number("trainable_parameters") for run in self._of(model, method)]
        counts = [int(count) for count in found if count and count > 0]
        return max(sorted(set(counts)), key=counts.count) if counts else None

    def trained_percent(self, model: str, method: str) -> float | None:
        """Trained parameters in percent of all parameters, adapter and head included; None if no run has both."""
        trained = self.parameters(model, method)
        runs = [run for run in self._of(model, method) if run.facts.get("trainable_parameters") == trained]
        total = next(filter(None, (run.number("total_parameters") for run in runs)), None)
        return 100 * trained / total if trained and total else None

    def _of(self, model: str, method: str) -> list[FinishedRun]:
        return [run for run in self.sweep.finished if (run.key.model, run.key.method) == (model, method)]

    def kind(self, method: str) -> str:
        """Return the adapter's class as the runs name it, for lines that join ranks: ``RandLoRA``, ``LoRA`` ..."""
        runs = (run for run in self.sweep.finished if run.key.method == method and "method" in run.facts)
        return next((str(run.facts["method"]) for run in runs), method)

    def is_randlora(self, method: str) -> bool:
        """Return True if the runs' adapter, not the label, is RandLoRA: LoRA may be ``matched to RandLoRA-6``."""
        return self.kind(method).lower().startswith("randlora")

    def family(self, model: str) -> str:
        """Return a model's family: from the sweep, else the first word of its label."""
        return self.plan.families.get(model) or model.replace("_", "-").partition("-")[0]
