"""The plan of a sweep and its runs as one table, and the means and counts that a report takes of it."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, Self

import yaml
from pandas import DataFrame, concat, isna

from randlora_pl.lab.report import Estimate
from randlora_pl.language.prompt_sets import TASKS
from randlora_pl.sweep import ZERO_SHOT, SweepConfig, is_zero_shot
from randlora_pl.utils.adapter_schema import check_arguments
from randlora_pl.utils.errors import UserError, brief, first_line
from randlora_pl.utils.files import parse_json, parse_yaml

FILE = "sweep.yaml"

FIGURES = {"1": ["11", "12", "13", "14"], "2": ["14"], "3": ["11", "12", "13"]}
"""Tables whose averages the paper's Figures show. Figure 2's CLIP towers alone are in no table."""


class Key(NamedTuple):
    """A cell of a table: what its seeds have in common."""

    model: str
    dataset: str
    budget: str
    method: str


class ReportPlan(SweepConfig):
    """Description of a sweep, with the labels that only its cells have after the planned ones."""

    @classmethod
    def unknown(cls) -> Self:
        """Return the plan of a sweep without a file, to which the labels of its cells are added."""
        return cls(models={}, methods={}, datasets={}, budgets=[], seeds=[])

    @property
    def figure(self) -> str | None:
        """Return the figure of the paper whose tables these are, if one was named."""
        return None if self.paper.get("figure") is None else str(self.paper["figure"])

    @property
    def tables(self) -> list[str]:
        """Return the tables of the paper to compare with."""
        named = self.paper.get("table", self.paper.get("tables", []))
        numbers = [str(number) for number in (named if isinstance(named, list) else [named])]
        return numbers or FIGURES.get(self.figure or "", [])

    def paper_name(self, label: str, model: str = "") -> str:
        """Return the paper's name of one of our labels, for a model of ours; the label itself if the file has none."""
        for part in (self.methods, self.datasets, self.models):
            facts = part.get(label, {})
            named = facts.get("paper_name")
            if part is self.datasets and list(facts) == ["dataset"]:  # another label, but the same images
                named = named or facts["dataset"]
            names = {str(key): name for key, name in named.items()} if isinstance(named, dict) else {"": named}
            if name := names.get(model) or names.get(""):
                return str(name)
        return label

    def cells(self) -> Iterator[Key]:
        """Yield the product of models, datasets, budgets and methods; the pretrained model once for each dataset."""
        for model, dataset in product(self.models, self.datasets):
            methods = self.methods_of(model)
            for budget, method in product(self.budgets, methods):
                if budget != ZERO_SHOT and not is_zero_shot(method):
                    yield Key(model, dataset, budget, method)
            for method in filter(is_zero_shot, methods):
                yield Key(model, dataset, ZERO_SHOT, method)


def read_plan(folder: Path) -> ReportPlan:
    """Return the plan of a sweep.

    Raises:
        UserError: The file is missing, damaged or does not describe a sweep.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"{FILE} is missing: cells that were not run cannot be listed.")
    try:
        plan = ReportPlan(**vars(SweepConfig.from_content(parse_yaml(file.read_text(encoding="utf-8")))))
        return replace(plan, budgets=sorted(plan.budgets, key=budget_order))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{FILE} is cut off or damaged ({first_line(error)}).") from error
    except (TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(f"{FILE} does not describe a sweep ({first_line(error)}).") from error


def budget_order(label: str) -> tuple[int, float]:
    """Sort budgets by the amount of data: the pretrained model, shots, percent or size, anything else."""
    number, kind = label.rstrip("%k").removesuffix("-shot"), 1 if label.endswith("-shot") else 2
    if label == ZERO_SHOT:
        return 0, 0
    try:
        return kind, float(number)
    except ValueError:
        return 3, 0


BASELINES = "baselines.json"
"""File of them in the folder of a sweep, and of its report."""
MOST = 16_000_000
"""Largest number of pixel values of the training images: with more, as many images as fit are drawn."""
SIDE = 32
"""Height and width that larger images, and images of several sizes, are reduced to."""


@dataclass(frozen=True)
class Baseline:
    """Result of a plain classifier.

    Attributes:
        score: Test accuracy from 0 to 1; of scores the correlation.
        train: Training samples that it saw.
        of: Training samples that the methods saw.
    """

    dataset: str
    budget: str
    seed: int
    name: str
    score: float
    train: int
    of: int


def read_baselines(folder: Path, warn: Callable[[str], None]) -> list[Baseline]:
    """Return the baselines in the folder of a sweep or report; none where the file is missing or damaged."""
    try:
        rows = parse_json((folder / BASELINES).read_text(encoding="utf-8"))
        for row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{brief(row)} is not a result")
            check_arguments(Baseline, row, BASELINES)
        return [one for one in (Baseline(**row) for row in rows) if -1 <= one.score <= 1]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, UserError) as error:
        warn(f"{BASELINES} is cut off or damaged ({error})")
        return []


FINISHED, FAILED, NOT_RUN = "finished", "failed", "not run"
"""States of a run, others are running, unfinished and damaged. Only the accuracy of a finished one is used."""
LABELS = list(Key._fields)
TEST = "test/acc/"
"""Prefix of the metrics of runs that have several tests."""
RIGHT = "test/right"
"""Column with the test samples that were classified correctly, packed."""
METRIC = "data/metric"
"""Column with the metric of labelled texts: ``acc``, ``matthews`` or ``pearson``."""
SCORE = "score"
"""Metric of tasks without classes: a share of at most 1, which is a mean over the test samples."""
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
    seeds: tuple[int, ...]
    all_seeds: tuple[int, ...]


@dataclass
class Sweep:
    """All runs of a sweep, planned or found.

    Attributes:
        plan: Plan of the sweep; its labels are also those that only the cells have.
        cells: A row for each run in the order of the plan, with the columns of `read_cells`.
        warnings: Unreadable files, one line each.
        baselines: Results of plain classifiers of pixels or words.
    """

    folder: Path
    plan: ReportPlan
    cells: DataFrame
    warnings: list[str] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Sort the runs by model, budget, method, dataset and seed, each in the order of the plan."""
        places = {name: {label: n for n, label in enumerate(getattr(self.plan, f"{name}s"))} for name in LABELS}
        order = ["model", "budget", "method", "dataset", "seed"]
        rank = lambda column: column.map(places[column.name]) if column.name in places else column  # noqa: E731
        self.cells = self.cells.sort_values(order, key=rank, na_position="first", ignore_index=True)

    @cached_property
    def finished(self) -> DataFrame:
        """Return the runs with an accuracy."""
        return self.cells[self.cells["accuracy"].notna()]

    def select(self, **labels: str) -> DataFrame:
        """Return the finished runs with some labels."""
        rows = self.finished
        for name, label in labels.items():
            rows = rows[rows[name] == label]
        return rows

    @cached_property
    def accuracies(self) -> dict[Key, dict[int, float]]:
        """Return the accuracy in percent of each finished seed, by cell."""
        groups = self.finished.groupby(LABELS, sort=False)
        return {Key(*key): dict(zip(runs["seed"], runs["accuracy"], strict=True)) for key, runs in groups}

    @cached_property
    def runs(self) -> dict[Key, DataFrame]:
        """Return seed, state, status and accuracy of every run, by cell."""
        groups = self.cells.groupby(LABELS, sort=False)[["seed", "state", "status", "accuracy"]]
        return {Key(*key): runs for key, runs in groups}

    @cached_property
    def metrics(self) -> dict[str, str]:
        """Return the metric of each dataset whose metric is not the accuracy."""
        rows = self.finished[self.finished[METRIC].isin(CORRELATIONS)]
        return {dataset: CORRELATIONS[metric] for dataset, metric in zip(rows["dataset"], rows[METRIC], strict=True)}

    @property
    def measured(self) -> str:
        """Return the name of what the tests measure in percent."""
        if SCORE in {*self.finished[METRIC]}:
            return SCORE
        return "accuracy or correlation" if self.metrics else "accuracy"

    def by_seed(self, key: Key) -> dict[int, float]:
        """Accuracy of each finished seed in percent."""
        return self.accuracies.get(key, {})

    def estimate(self, key: Key) -> Estimate | None:
        """Mean over the finished seeds; None without one."""
        values = tuple(self.by_seed(key).values())
        return Estimate(values) if values else None

    @cached_property
    def pretrained(self) -> dict[tuple[str, str], float]:
        """Return the accuracy of the pretrained model in percent, by model and dataset, if it was measured."""
        beside, tested = self.cells.dropna(subset="zeroshot_accuracy"), self.select(budget=ZERO_SHOT)
        accuracies: dict[tuple[str, str], float] = {}
        for runs, name in ((beside, "zeroshot_accuracy"), (tested, "accuracy")):
            accuracies |= runs.groupby(["model", "dataset"])[name].agg(fmean).to_dict()
        return accuracies

    def idle(self, key: Key) -> bool:
        """Return True if a trained cell does not differ from the pretrained model, which lies within its interval."""
        estimate, zero = self.estimate(key), self.pretrained.get((key.model, key.dataset))
        if key.budget == ZERO_SHOT or estimate is None or estimate.half is None or zero is None:
            return False
        return abs(estimate.mean - zero) <= estimate.half

    def why_missing(self, key: Key) -> str:
        """Return the reason that a cell without a result shows; the reason of a failure comes first."""
        runs = self.runs.get(key, self.cells[:0])
        tried = runs[runs["state"] != NOT_RUN].sort_values("state", key=lambda state: state != FAILED, kind="stable")
        return str(tried["status"].iloc[0]) if len(tried) else NOT_RUN

    def methods(self, model: str, budget: str) -> list[str]:
        """Return the methods with a finished run, in order."""
        labels = {key.method for key in self.accuracies if (key.model, key.budget) == (model, budget)}
        return [method for method in self.plan.methods if method in labels]

    def budgets(self, model: str) -> list[str]:
        """Return the budgets of a model's runs, in order; the pretrained model's as well."""
        labels = {key.budget for key in self.runs if key.model == model}
        return [budget for budget in self.plan.budgets if budget in labels]

    def trained_budgets(self, model: str) -> list[str]:
        """Return the budgets without the pretrained model's."""
        return [budget for budget in self.budgets(model) if budget != ZERO_SHOT]

    def common(self, model: str, budget: str) -> tuple[list[str], dict[str, list[str]]]:
        """Return the datasets that every compared method has at a budget.

        A method without any finished run at the budget is not compared there: its own cell shows the reason.

        Returns:
            The datasets; and of each that is left out, the methods that lack it.
        """
        lacking = {}
        for dataset in self.plan.datasets:
            cells = [Key(model, dataset, budget, method) for method in self.methods(model, budget)]
            if any(key in self.runs for key in cells):  # else it is of other models only
                lacking[dataset] = [key.method for key in cells if key not in self.accuracies]
        shared = [dataset for dataset, methods in lacking.items() if not methods]
        return shared, {dataset: methods for dataset, methods in lacking.items() if methods}

    def average(self, model: str, budget: str, method: str, datasets: Sequence[str]) -> Average | None:
        """Return the mean over datasets; None where one of them has no finished run.

        Averaged seed by seed, over the seeds that all of these datasets have, so that the interval is one over seeds.
        With fewer than two such seeds it is the mean of the cells' means, without an interval.
        """
        cells = [self.by_seed(Key(model, name, budget, method)) for name in datasets]
        if not cells or not all(cells):
            return None
        seeds = sorted({seed for cell in cells for seed in cell}, key=lambda seed: (isna(seed), seed))
        common = [seed for seed in seeds if all(seed in cell for cell in cells)]
        of_seeds = [fmean(cell[seed] for cell in cells) for seed in common]
        values = of_seeds if len(common) > 1 else [fmean(fmean(cell.values()) for cell in cells)]
        return Average(Estimate(tuple(values)), tuple(common), tuple(seeds))

    @cached_property
    def _sizes(self) -> dict[tuple[str, str], int]:
        trained = self.finished[self.finished["trainable_parameters"] > 0]
        counts = trained.groupby(["model", "method"])["trainable_parameters"]
        return {labels: int(each.mode()[0]) for labels, each in counts}

    def parameters(self, model: str, method: str) -> int | None:
        """Trained parameters: of the runs with the most common number, since a linear head's differs by dataset.

        None without a finished run.
        """
        return 0 if is_zero_shot(method) else self._sizes.get((model, method))  # its runs may count what could train

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Return the class of each method's adapter as the runs name it, for lines that join ranks, else its label."""
        known = self.finished.dropna(subset="adapter").drop_duplicates("method")
        labels = {method: method for method in self.plan.methods}
        return labels | dict(zip(known["method"], known["adapter"], strict=True))

    def is_randlora(self, method: str) -> bool:
        """Return True if the runs' adapter, not the label, is RandLoRA: LoRA may be ``matched to RandLoRA-6``."""
        return self.kinds[method].lower().startswith("randlora")

    def family(self, model: str) -> str:
        """Return a model's family: from the sweep, else from its cells, else the first word of its label."""
        of_cells = next(filter(None, self.cells[self.cells["model"] == model]["family"]), "")
        return self.plan.models[model].get("family") or of_cells or model.replace("_", "-").partition("-")[0]

    @cached_property
    def tests(self) -> dict[str, list[str]]:
        """Return the columns of the tests of each dataset, in the paper's order, where its runs have several tests."""
        known = [name for name in self.cells if name.startswith(TEST)]
        places = {f"{TEST}{name}": place for place, name in enumerate(TASKS)}
        known.sort(key=lambda name: places.get(name, len(places)))
        there = {dataset: self.select(dataset=dataset)[known].notna().any() for dataset in self.plan.datasets}
        return {dataset: [name for name in known if some[name]] for dataset, some in there.items() if some.any()}

    def by_test(self) -> "Sweep":
        """Return the same sweep with every test in place of its dataset; a run is there once for each of its tests.

        A run without a result stands under every test that the finished ones have. A name that two datasets have
        is followed by the dataset's label.
        """
        if not self.tests:
            return self
        names = {name: name.removeprefix(TEST) for table in self.tests.values() for name in table}
        titles = {column: TASKS[name].title if name in TASKS else name for column, name in names.items()}
        count = Counter(titles[column] for table in self.tests.values() for column in table)
        datasets, parts = {}, []
        for dataset, facts in self.plan.datasets.items():
            runs = self.cells[self.cells["dataset"] == dataset]
            if dataset not in self.tests:
                datasets[dataset] = facts
                parts.append(runs)
            for name in self.tests.get(dataset, []):
                label = titles[name] if count[titles[name]] == 1 else f"{dataset} {titles[name]}"
                datasets[label] = {}
                parts.append(runs.assign(dataset=label, accuracy=100 * runs[name].where(runs["accuracy"].notna())))
        return replace(self, plan=replace(self.plan, datasets=datasets), cells=concat(parts))
