"""Method against method: a difference for each pair, a verdict where one can be given, and a matrix of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from statistics import fmean, mode

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from randlora_pl.lab.report import (
    Crossed,
    Estimate,
    Table,
    TableCell,
    formatted,
    holm,
    many,
    mean_cell,
    row,
    shown,
    sign_flip_test,
)
from randlora_pl.lab.report.accuracy import identifier
from randlora_pl.lab.report.cells import RIGHT, Key, Sweep
from randlora_pl.lab.report.training import EDGE, heads_tied, nearest, untuned
from randlora_pl.sweep import is_zero_shot
from randlora_pl.utils.text import unpack_bits

EQUAL = 1.1
"""Up to this ratio two numbers of trained parameters count as equal."""
COMPARABLE = 1.5
"""Largest size ratio of a pair compared at the start of the report: the paper's own matches are up to 35 % off."""
SEEDS = 5
"""Fewer common seeds give no verdict."""
DATASETS = 6
"""Fewer datasets cannot give p < 0.05, since the signs of n differences have 2**n patterns."""
SAMPLES = 100
"""Fewer test samples of a single dataset give no verdict: one of them is more than a point."""
DIFFERING = 10
"""Fewer test samples on which two methods differ give no verdict, since the p of the t-test is too small for them."""
LEVEL = 0.05
TIED = "heads tied"
"""Mark of a pair of which `heads_tied` is true."""

RULE = (
    "A difference is paired by dataset, budget and seed, and averaged within each dataset. Its interval is the 95 % "
    "confidence interval (Student's t) over datasets. p comes from a two-sided sign-flip test over datasets, with "
    "Holm's correction for the number of tested pairs. A pair has a verdict if both learning rates were chosen by one "
    f"rule and there are at least {SEEDS} common seeds in all compared cells and at least {DATASETS} datasets. One "
    f"method is better if the adjusted p is below {LEVEL:g}. Numbers of trained parameters count as equal up to a "
    f"factor of {EQUAL:g}."
)
RULE_ONE = (
    "A difference is paired by test sample, budget and seed. Its interval is the 95 % confidence interval (Student's "
    "t) over test samples and seeds together, whose variances add up. p comes from the same t-test, with Holm's "
    "correction for the number of tested pairs. A pair has a verdict if both learning rates were chosen by one rule "
    f"and there are at least {SEEDS} common seeds and {SAMPLES} test samples, of which the methods differ on at least "
    f"{DIFFERING}. A correlation has no verdict. One method is better if the adjusted p is below {LEVEL:g}. That "
    "holds for new samples of the dataset, and not for other datasets. Numbers of trained parameters count as equal "
    f"up to a factor of {EQUAL:g}."
)


@dataclass(frozen=True)
class Versus:
    """One pair of methods.

    Attributes:
        first: One method, a RandLoRA where one of the two is.
        ratio: Trained parameters of the first, divided by the second's.
        seeds: Common seeds of the cell with the fewest; of ``crossed`` its runs, which every cell has.
        cells: Differences of each dataset and budget in points, one for each common seed.
        untuned: Why the rates are not comparable; empty where they are.
        planned: Whether the sweep tests the pair.
        crossed: Difference in points over the test samples and seeds of a sweep of one dataset; None where these were
            not recorded, and in a sweep of several datasets.
        only: The dataset of a sweep that has no other; empty in a sweep of several.
        correlation: The metric of this dataset if it is not the accuracy.
        tied: Whether the sweep tests the pair, and its difference is also one between heads (`heads_tied`).
        p: Adjusted; None where nothing was tested.
    """

    model: str
    first: str
    second: str
    ratio: float
    seeds: int
    cells: dict[tuple[str, str], Estimate]
    untuned: str = ""
    planned: bool = True
    crossed: Crossed | None = None
    only: str = ""
    correlation: str = ""
    tied: bool = False
    p: float | None = None

    def similar(self, most: float) -> bool:
        """Return True if the numbers of trained parameters differ at most by a factor."""
        return max(self.ratio, 1 / self.ratio) <= most

    def turned(self) -> "Versus":
        """Return the same pair with the second method first."""
        cells = {labels: Estimate(tuple(-value for value in cell.values)) for labels, cell in self.cells.items()}
        crossed = self.crossed and replace(self.crossed, mean=-self.crossed.mean)
        return replace(self, first=self.second, second=self.first, ratio=1 / self.ratio, cells=cells, crossed=crossed)

    @property
    def by_dataset(self) -> dict[str, float]:
        """Mean difference of each dataset over its budgets."""
        differences: dict[str, list[float]] = {}
        for (dataset, _), difference in self.cells.items():
            differences.setdefault(dataset, []).append(difference.mean)
        return {dataset: fmean(values) for dataset, values in differences.items()}

    def of_budget(self, budget: str) -> Estimate | None:
        """Return the difference at one budget over datasets, or over the seeds of a single dataset."""
        cells = [cell for (_, label), cell in self.cells.items() if label == budget]
        if len(self.by_dataset) == 1:
            return cells[0] if cells else None
        return Estimate(tuple(cell.mean for cell in cells)) if cells else None

    @property
    def difference(self) -> Estimate | Crossed:
        """Mean difference in points, over datasets, or over the test samples and seeds of the only one."""
        return self.crossed or Estimate(tuple(self.by_dataset.values()))

    @property
    def alike(self) -> bool:
        """True if nothing but the small number of test samples on which the methods differ prevents a verdict."""
        one = self.crossed
        few = one is not None and one.samples >= SAMPLES and one.differing < DIFFERING
        return few and self.planned and self.seeds >= SEEDS and not (self.untuned or self.correlation)

    def span(self, count: int) -> tuple[float, float] | None:
        """Return the interval of the difference in points if 95 % must hold for several pairs at once (Bonferroni).

        If the methods differ on too few test samples for Student's t, it is as wide as the share of samples on which
        they may differ (Clopper and Pearson, 1934).

        Returns:
            Its ends; None without records of the same test samples.
        """
        if self.crossed is None:
            return None
        samples, differing = self.crossed.samples, self.crossed.differing
        if differing < min(DIFFERING, samples):
            share = 100 * float(stats.beta.ppf(1 - 0.025 / count, differing + 1, samples - differing))
            return -share, share
        half = float(stats.t.ppf(1 - 0.025 / count, self.crossed.freedom)) * self.crossed.error
        return self.crossed.mean - half, self.crossed.mean + half

    @property
    def lacking(self) -> str:
        """Runs that a verdict needs and that are missing; empty if there are enough."""
        fewest = min(len(difference.values) for difference in self.cells.values())
        recorded = " with records of the same test samples (test/right in results.json)" * (self.seeds < fewest)
        missing = [f"{many(self.seeds, 'seed')}{recorded}, {SEEDS} are needed"] if self.seeds < SEEDS else []
        if not self.only:
            count = len(self.by_dataset)
            missing += [f"{many(count, 'dataset')}, {DATASETS} are needed"] if count < DATASETS else []
        elif self.correlation:
            missing.append(f"a {self.correlation} correlation is not a mean over test samples")
        elif self.crossed is None:
            missing.append("no record of the same test samples in two common seeds (test/right in results.json)")
        else:
            samples, differing = (many(n, "test sample") for n in (self.crossed.samples, self.crossed.differing))
            missing += [f"{samples}, {SAMPLES} are needed"] if self.crossed.samples < SAMPLES else []
            few = self.crossed.differing < DIFFERING
            missing += [f"{differing} on which the methods differ, {DIFFERING} are needed"] if few else []
        return "; ".join(missing)

    @property
    def obstacle(self) -> str:
        """Reason for a missing verdict; empty if there is one."""
        if not self.planned:
            return "not planned"
        reasons = [f"not tuned: {self.untuned}"] if self.untuned else []
        reasons += [f"no verdict: {self.lacking}"] if self.lacking else []
        return "; ".join(reasons)

    @property
    def verdict(self) -> str:
        """Verdict: the better method, no difference found, or the reason for no verdict."""
        if self.p is None:
            return self.obstacle
        better = self.first if self.difference.mean > 0 else self.second
        return f"{better} is better" if self.p < LEVEL else "no difference found"

    def sentence(self) -> str:
        """Return the comparison in one sentence."""
        many_times = "equally many" if self.similar(EQUAL) else f"{self.ratio:.2f} times as many"
        start = f"{self.model}: {self.first} against {self.second}, with {many_times} trained parameters: "
        tail = f"; {TIED}." if self.tied else "."
        if self.untuned:
            return f"{start}{self.verdict}{tail}"
        units = many(len(self.by_dataset), "dataset")
        if self.crossed:
            units = f"{many(self.crossed.samples, 'test sample')} of {self.only} and {many(self.seeds, 'seed')}"
        start += f"{shown(self.difference, '+.1f')} points over {units}; {self.verdict}"
        return start + ("" if self.p is None else f"{reach(self.only)} (p = {self.p:.2g})") + tail


def reach(only: str) -> str:
    """Return what the verdict of a sweep of one dataset holds for; empty for several."""
    return f" for new samples of {only}, which says nothing about other datasets" if only else ""


def comparisons(sweep: Sweep) -> list[Versus]:
    """Return every pair of trained methods of each model; those that the sweep plans to test are tested together.

    These come first, and among them pairs of a RandLoRA with another method of about its size.
    """
    methods = [method for method in sweep.plan.methods if not is_zero_shot(method)]
    only = next(iter(sweep.plan.datasets)) if len(sweep.plan.datasets) == 1 else ""
    correlation = sweep.metrics.get(only, "").partition(" ")[0]
    pairs = []
    for model, pair in product(sweep.plan.models, combinations(methods, 2)):
        first, second = sorted(pair, key=lambda method: not sweep.is_randlora(method))
        sizes = [sweep.parameters(model, method) for method in (first, second)]
        cells = {}
        for dataset, budget in product(sweep.plan.datasets, sweep.trained_budgets(model) if all(sizes) else ()):
            ours = sweep.by_seed(Key(model, dataset, budget, first))
            theirs = sweep.by_seed(Key(model, dataset, budget, second))
            if seeds := sorted(ours.keys() & theirs.keys()):
                cells[dataset, budget] = Estimate(tuple(ours[seed] - theirs[seed] for seed in seeds))
        if cells:
            ratio, reason = (sizes[0] or 0) / (sizes[1] or 1), untuned(sweep, model, (first, second))
            planned = not sweep.plan.pairs or any({first, second} == {*each} for each in sweep.plan.pairs)
            keys = [Key(model, *labels, first) for labels in cells]
            crossed = _crossed(sweep, keys, second) if only and not correlation else None
            count = crossed.runs if crossed else min(len(difference.values) for difference in cells.values())
            tied = planned and heads_tied(sweep, model, (first, second))
            about = (reason, planned, crossed, only, correlation, tied)
            pairs.append(Versus(model, first, second, ratio, count, cells, *about))
    tested = [one for one in pairs if not one.obstacle]
    values = [one.crossed.p if one.crossed else sign_flip_test([*one.by_dataset.values()]) for one in tested]
    adjusted = {id(one): p for one, p in zip(tested, holm(values), strict=True)}
    judged = [replace(one, p=adjusted.get(id(one))) for one in pairs]

    def place(one: Versus) -> tuple[bool, ...]:
        kinds = not sweep.is_randlora(one.first), sweep.is_randlora(one.second)
        return not one.planned, not one.similar(COMPARABLE), *kinds

    return sorted(judged, key=place)


def _crossed(sweep: Sweep, keys: Sequence[Key], second: str) -> Crossed | None:
    """Return the difference over test samples and seeds, averaged over budgets; None without two common seeds.

    Seeds with another number of test samples than the most common one are left out.
    """

    def right(key: Key) -> dict[int, NDArray[np.bool_]]:
        """Return which test samples each seed classified correctly, for the seeds that recorded it."""
        runs = sweep.select(**key._asdict())
        by_seed = {seed: unpack_bits(text) for seed, text in zip(runs["seed"], runs[RIGHT], strict=True)}
        return {seed: values for seed, values in by_seed.items() if values is not None}

    pairs = [(right(key), right(key._replace(method=second))) for key in keys]
    common = set.intersection(*(ours.keys() & theirs.keys() for ours, theirs in pairs))
    sizes = {seed: [len(side[seed]) for pair in pairs for side in pair] for seed in sorted(common)}
    usual = mode([size for each in sizes.values() for size in each] or [0])
    seeds = [seed for seed, each in sizes.items() if set(each) == {usual}]
    if len(seeds) < 2 or usual < 2:
        return None
    of_budgets = [np.stack([100.0 * ours[seed] - 100.0 * theirs[seed] for seed in seeds]) for ours, theirs in pairs]
    return Crossed.over(np.mean(of_budgets, axis=0))


def versus_table(pairs: list[Versus]) -> Table:
    """Return the pairs as a table; the tooltip of a difference has every cell with its interval over seeds."""
    below = [RULE_ONE if any(one.only for one in pairs) else RULE]
    if not all(one.planned for one in pairs):
        below.append(
            "Only the pairs that the sweep planned (pairs in sweep.yaml) are tested and counted by the correction. "
            "The others show their difference and its interval."
        )
    if any(one.tied and one.p is not None for one in pairs):
        below.append(
            f"{TIED.capitalize()}: a head learned at the rate of its adapter, which was not searched for it, and the "
            "head of the other method at another rate. So the difference is also one between heads."
        )
    rows = []
    for one in pairs:
        each = "; ".join(f"{' '.join(labels)} {shown(cell, '+.2f')}" for labels, cell in one.cells.items())
        ratio = TableCell(f"{one.ratio:.2f}" + (" equal" if one.similar(EQUAL) else ""), sort=one.ratio)
        difference = mean_cell(one.difference, each, "+.2f")
        p = TableCell("" if one.p is None else f"{one.p:.2g}", sort=one.p)
        tied = TIED * (one.tied and one.p is not None)
        verdict = TableCell(one.verdict, tied, best=one.p is not None and one.p < LEVEL)
        counts = (len(one.by_dataset), one.seeds)
        rows.append(row(one.first, one.second, one.model, verdict, ratio, difference, *counts, p))
    titles = ("Parameter ratio", "Mean difference, points", "Datasets", "Seeds", "p, adjusted")
    header = row("Method", "against", "Model", "Verdict", *titles)
    return Table("versus-pairs", "One verdict for each pair of methods", header, rows, below, left=4)


@dataclass(frozen=True)
class Reference:
    """A reference method of a model, and the pair of each other method with it, the other one first."""

    model: str
    method: str
    pairs: dict[str, Versus]


def references(sweep: Sweep, versus: Sequence[Versus]) -> list[Reference]:
    """Return the reference of each model that has two methods to compare.

    It is the LoRA whose size is nearest to the first RandLoRA's, else full fine-tuning, else the first method.
    """
    chosen = []
    for model in sweep.plan.models:
        here = [one for one in versus if one.model == model]
        paired = {method for one in here for method in (one.first, one.second)}
        if methods := [method for method in sweep.plan.methods if method in paired]:
            size = next((sweep.parameters(model, m) for m in methods if sweep.is_randlora(m)), None)
            method = nearest(sweep, model, methods, size or 1) or methods[0]
            pairs = {one.first: one for one in here if one.second == method}
            pairs |= {one.second: one.turned() for one in here if one.first == method}
            chosen.append(Reference(model, method, {m: pairs[m] for m in methods if m in pairs}))
    return chosen


def conclusion(sweep: Sweep, versus: Sequence[Versus], compared: Sequence[Reference]) -> list[str]:
    """Return what the sweep shows: verdicts or the reason for none, and the difference that matters most."""
    planned = [one for one in versus if one.planned]
    judged = [one for one in planned if one.p is not None]
    paired = {(one.model, frozenset((one.first, one.second))) for one in versus}
    lacking = {}
    for model, (first, second) in product(sweep.plan.models, sweep.plan.pairs):
        labels = model, frozenset((first, second))
        if labels not in paired and {first, second} <= {*sweep.plan.methods_of(model)}:
            lacking[labels] = f"{first} against {second} on {model}"
    count = len(planned) + len(lacking)
    lines = []
    if judged:
        winners: dict[str, list[str]] = {}
        for one in judged:
            if one.p is not None and one.p < LEVEL:
                better, worse = (one.first, one.second) if one.difference.mean > 0 else (one.second, one.first)
                winners.setdefault(f"{one.model}: {better}", []).append(worse + f" ({TIED})" * one.tied)
        held = reach(judged[0].only)
        lines += [f"{winner} is better than {', '.join(losers)}{held}." for winner, losers in winners.items()]
        differing = sum(map(len, winners.values()))
        tested = f"{many(len(judged), 'pair')} of methods that could be tested"
        tested += f", of {count} planned" if sweep.plan.pairs else ""
        some = f"A difference was found in {differing} of the {tested} (adjusted p < {LEVEL:g})."
        lines.append(some if winners else f"No difference was found in the {tested}{held}.")
    untuned = "the learning rates are not tuned (randlora-pl sweep CONFIG --tune searches them)"
    missing = [one for one in planned if one.obstacle]
    edge = "a best rate lies at the edge of its search (randlora-pl tune --trials N searches on)"
    rates = [edge if EDGE in one.untuned else one.untuned and untuned for one in missing]
    reasons = Counter("; ".join(filter(None, (why, one.lacking))) for why, one in zip(rates, missing, strict=True))
    if (reasons or lacking) and not judged:
        lines.append("This sweep cannot show which method is more accurate.")
    pairs = many(count, "planned pair" if sweep.plan.pairs else "pair")
    lines += _about_heads(sweep, [one for one in planned if one.tied], pairs)
    lines += [f"No verdict for {number} of {pairs} of methods: {reason}." for reason, number in reasons.items()]
    lines += [f"No verdict for {they}: they have no finished training runs in common." for they in lacking.values()]
    if sweep.plan.pairs:
        return lines + [one.sentence() for one in planned]
    for here in compared:
        near = [one for one in here.pairs.values() if sweep.is_randlora(one.first) and one.similar(COMPARABLE)]
        lines += [one.sentence() for one in near[:1]]
    return lines


def _about_heads(sweep: Sweep, tied: Sequence[Versus], pairs: str) -> list[str]:
    """Return what the heads of tied pairs learned at, of so many pairs in all."""
    if not tied:
        return []
    methods = {method for one in tied for method in (one.first, one.second)}
    runs = sweep.finished[sweep.finished["tied"].eq(True) & sweep.finished["method"].isin(methods)]
    rates = dict(zip(runs["method"], runs["learning_rate"], strict=True))
    low, high = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    return [
        f"{TIED.capitalize()} in {len(tied)} of {pairs} of methods: a head learned at the rate of its adapter, from "
        f"{rates[low]:g} ({low}) to {rates[high]:g} ({high}), which was not searched for it. So a difference between "
        "methods is also one between their heads. To search both rates, add head_learning_rate to tune.search, and run "
        "randlora-pl sweep CONFIG --tune."
    ]


def matrix_table(sweep: Sweep, here: Reference) -> Table:
    """Return methods by datasets and budgets, each cell colored by its difference to the reference."""
    shared = {labels for one in here.pairs.values() for labels in one.cells}
    every = [c for c in product(sweep.plan.datasets, sweep.trained_budgets(here.model)) if c in shared]
    apart = len(every) <= 12  # of more, a column is the mean over budgets
    columns = every if apart else list(dict.fromkeys((dataset, "") for dataset, _ in every))
    rows = []
    for method, one in here.pairs.items():
        cells = [_cell(sweep, here, one, labels, apart) for labels in columns]
        if one.p is None:
            short = one.obstacle if not one.planned else "not tuned" if one.untuned else "no verdict"
            verdict = TableCell(short, title=one.obstacle)
        else:
            differs, higher = one.p < LEVEL, one.difference.mean > 0
            text = "no difference found" if not differs else "better" if higher else "worse"
            beside = f"p = {one.p:.2g}" + f", {TIED}" * one.tied
            verdict = TableCell(text, beside, best=differs and higher, sort=one.p)
        size, mean = sweep.parameters(here.model, method), mean_cell(one.difference, form="+.2f")
        rows.append(row(method, size, mean, verdict, *cells))
    titles = [TableCell(dataset, below=budget or "mean over budgets") for dataset, budget in columns]
    units = "test samples and seeds" if any(one.crossed for one in here.pairs.values()) else "datasets"
    below = [
        f"Each number is the {sweep.measured} of the method minus the {sweep.measured} of the reference, in "
        "points, paired by seed. Blue is higher and orange is lower. The color shows the size of a "
        "difference and is not a verdict. "
        + ("Below it is half the 95 % confidence interval over seeds. " if apart else "")
        + f"The interval of the mean is over {units}. The verdict comes from the paired test."
    ]
    header = row("Method", "Trained parameters", "Mean difference", "Verdict", *titles)
    caption = f"{here.model}: difference to {here.method}, points"
    return Table(f"matrix-{identifier(here.model)}", caption, header, rows, below)


def _cell(sweep: Sweep, here: Reference, one: Versus, labels: tuple[str, str], apart: bool) -> TableCell:
    dataset, budget = labels
    by_budget = {b: cell for (d, b), cell in one.cells.items() if d == dataset and budget in ("", b)}
    if not by_budget:
        lacking = [Key(here.model, dataset, budget, name) for name in (one.first, one.second)] if budget else []
        why = next((sweep.why_missing(key) for key in lacking if key not in sweep.accuracies), "no common seed")
        return TableCell("-", title=why, missing=True)
    value = one.by_dataset[dataset] if not budget else by_budget[budget].mean
    half = by_budget[budget].half if apart else None
    title = "; ".join(
        f"{b}: {shown(cell, '+.2f')} over {many(len(cell.values), 'seed')}" for b, cell in by_budget.items()
    )
    below = "" if half is None else f"± {half:.1f}"
    return TableCell(formatted(value), below, title, value, tint=value / (abs(value) + 2))  # half of it at 2 points
