"""RandLoRA against other methods at about equal parameters: wins, ties and losses, cell by cell and seed by seed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from randlora_pl.experiments.report.document import Cell, Table, many
from randlora_pl.experiments.report.plan import Key
from randlora_pl.experiments.report.results import Results
from randlora_pl.experiments.report.statistics import Estimate, rank_correlation, sign_test

EQUAL = 1.1
"""Up to this ratio two numbers of trained parameters count as equal."""
COMPARABLE = 1.5
"""Up to this ratio methods are compared at all: the paper's own matches are up to 35 % off."""

RULE = (
    "A cell is a data set at a budget. Paired by seed, it is a win or a loss where the mean difference is larger than "
    "its standard error, else a tie; with one common seed there is no standard error, and any difference counts. The "
    "mean difference is over data sets (each the mean of its cells), with its 95 % confidence interval; p is of a "
    f"two-sided sign test over data sets. Trained parameters are called equal up to a factor of {EQUAL:g}; methods "
    f"further apart than {COMPARABLE:g} are not compared. No correction is made for the number of comparisons."
)


@dataclass(frozen=True)
class Versus:
    """One comparison.

    Attributes:
        model: The model.
        first: A RandLoRA.
        second: What it is compared with.
        ratio: Trained parameters of the first, divided by those of the second.
        wins, ties, losses: Cells, seen from the first.
        single: How many of them have one common seed only.
        by_dataset: Mean difference of each data set in points.
    """

    model: str
    first: str
    second: str
    ratio: float
    wins: int
    ties: int
    losses: int
    single: int
    by_dataset: dict[str, float]

    @property
    def equal(self) -> bool:
        """Whether both train equally many parameters."""
        return max(self.ratio, 1 / self.ratio) <= EQUAL

    @property
    def difference(self) -> Estimate:
        """Points, over data sets."""
        return Estimate(tuple(self.by_dataset.values()))

    @property
    def p(self) -> float | None:
        """Of the sign test over data sets."""
        values = self.by_dataset.values()
        return sign_test(sum(value > 0 for value in values), sum(value < 0 for value in values))

    def told(self) -> str:
        """In one sentence."""
        cells = self.wins + self.ties + self.losses
        size = "equally many trained parameters" if self.equal else f"{self.ratio:.2f} times its trained parameters"
        half = self.difference.half
        spread = "" if half is None else f" ± {half:.1f}"
        counts = f"{many(self.wins, 'win')}, {many(self.ties, 'tie')}, {many(self.losses, 'loss', 'losses')}"
        return (
            f"{self.model}: {self.first} against {self.second} ({size}): {counts} in {many(cells, 'cell')}; "
            f"{self.difference.mean:+.1f}{spread} points over {many(len(self.by_dataset), 'data set')}."
        )


def comparisons(results: Results) -> list[Versus]:
    """Every RandLoRA against every method of about equally many trained parameters; other methods come first."""
    found = [one for model in results.plan.models for one in _of_model(results, model)]
    return sorted(found, key=lambda one: _is_randlora(results, one.second))


def _of_model(results: Results, model: str) -> Iterator[Versus]:
    sizes = {method: results.parameters(model, method) for method in results.plan.methods}
    for one, other in combinations([method for method, size in sizes.items() if size], 2):
        pair = (one, other) if _is_randlora(results, one) else (other, one)
        first, second = (sizes[method] for method in pair)
        if not _is_randlora(results, pair[0]) or not first or not second:
            continue
        if max(first / second, second / first) <= COMPARABLE and (
            found := _compare(results, model, *pair, first / second)
        ):
            yield found


def _is_randlora(results: Results, method: str) -> bool:
    """By the adapter that the runs name, not by the label: LoRA may be ``matched to RandLoRA-6``."""
    return results.kind(method).lower().startswith("randlora")


def _compare(results: Results, model: str, first: str, second: str, ratio: float) -> Versus | None:
    counts: Counter[str] = Counter()
    points: dict[str, list[float]] = {}
    for dataset in results.plan.datasets:
        for budget in results.trained_budgets(model):
            ours = results.by_seed(Key(model, dataset, budget, first))
            theirs = results.by_seed(Key(model, dataset, budget, second))
            seeds = sorted(ours.keys() & theirs.keys())
            if not seeds:
                continue
            difference = Estimate(tuple(ours[seed] - theirs[seed] for seed in seeds))
            error = difference.error or 0.0
            tie = abs(difference.mean) <= error
            counts["ties" if tie else "wins" if difference.mean > 0 else "losses"] += 1
            counts["single"] += len(seeds) == 1
            points.setdefault(dataset, []).append(difference.mean)
    if not points:
        return None
    means = {dataset: fmean(values) for dataset, values in points.items()}
    count = (counts["wins"], counts["ties"], counts["losses"], counts["single"])
    return Versus(model, first, second, ratio, *count, means)


def versus_table(found: list[Versus]) -> Table:
    """The comparisons as a table.

    Args:
        found: What `comparisons` found, at least one.
    """
    rows = []
    for one in found:
        half = one.difference.half
        each = "; ".join(f"{dataset} {value:+.2f}" for dataset, value in one.by_dataset.items())
        spread = "" if half is None else f" ± {half:.2f}"
        p = one.p
        rows.append([
            Cell(one.first),
            Cell(one.second),
            Cell(one.model),
            Cell(f"{one.ratio:.2f}" + (" equal" if one.equal else ""), sort=one.ratio),
            Cell(str(one.wins), sort=one.wins),
            Cell(str(one.ties), sort=one.ties),
            Cell(str(one.losses), sort=one.losses),
            Cell(f"{one.difference.mean:+.2f}{spread}", "", each, one.difference.mean),
            Cell(f"{len(one.by_dataset)}", sort=len(one.by_dataset)),
            Cell("" if p is None else f"{p:.3f}", sort=p),
        ])  # fmt: skip
    header = ["RandLoRA", "against", "Model", "Parameter ratio", "Wins", "Ties", "Losses", "Mean difference, points"]
    single = sum(one.single for one in found)
    lines = [RULE] + ([f"{single} of the compared cells have one common seed."] if single else [])
    titles = [Cell(title) for title in [*header, "Data sets", "p"]]
    return Table("versus-randlora", "RandLoRA at about equal parameters", titles, rows, below=lines, left=3)


def rank_table(results: Results) -> Table | None:
    """Rank of the update against accuracy, as Table 2 claims a relation; None where no run has figures of it.

    Spearman's correlation over methods, in each model and budget, of the mean of a ``spectrum/...`` figure with the
    mean accuracy over the data sets that all of these methods have.
    """
    every = {n for run in results.sweep.finished for n in run.facts if n.startswith("spectrum/") and run.number(n)}
    names = sorted(every - {"spectrum/steps"})
    rows = []
    for name in names:
        for model in results.plan.models:
            for budget in results.trained_budgets(model):
                pairs = _ranks(results, name, model, budget)
                value = rank_correlation(
                    [rank for rank, _ in pairs.values()], [accuracy for _, accuracy in pairs.values()]
                )
                if value is not None:
                    each = "; ".join(
                        f"{method}: {rank:.4g}, {accuracy:.1f} %" for method, (rank, accuracy) in pairs.items()
                    )
                    cells = [
                        Cell(name.removeprefix("spectrum/")),
                        Cell(model),
                        Cell(budget),
                        Cell(f"{value:+.2f}", "", each, value),
                    ]
                    rows.append([*cells, Cell(str(len(pairs)), sort=len(pairs))])
    if not rows:
        return None
    header = [Cell(title) for title in ("Figure of the update", "Model", "Data", "Spearman's correlation", "Methods")]
    below = [
        "Over the methods of each model and budget, whatever their trained parameters; it says nothing of a cause."
    ]
    return Table(
        "versus-rank", "Rank of the update against accuracy (the claim of Table 2)", header, rows, below=below, left=3
    )


def _ranks(results: Results, name: str, model: str, budget: str) -> dict[str, tuple[float, float]]:
    shared = tuple(results.common(model, [budget])[0])
    found = {}
    for method in results.methods(model, budget):
        runs = [run for dataset in shared for run in results.finished(Key(model, dataset, budget, method))]
        figures = [value for run in runs if (value := run.number(name)) is not None]
        average = results.average(model, budget, method, shared)
        if average and len(figures) == len(runs):
            found[method] = (fmean(figures), average.estimate.mean)
    return found
