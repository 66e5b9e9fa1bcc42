"""Contest of the methods for one dataset, and the recommendation that follows from it.

The simplest method is recommended unless another is shown to be better. Tests of differences are from `comparisons`.
"""

from itertools import permutations
from math import ceil, hypot, inf, isfinite
from statistics import fmean

from scipy.stats import binomtest

from randlora_pl.adapters import methods
from randlora_pl.lab.report import formatted, many
from randlora_pl.lab.report.cells import RIGHT, Key, Sweep
from randlora_pl.lab.report.comparisons import EQUAL, LEVEL, comparisons
from randlora_pl.lab.report.training import EDGE
from randlora_pl.sweep import ZERO_SHOT, is_zero_shot
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import unpack_bits


class Contest:
    """The trained methods of a sweep that have results, compared with each other, and the recommended one.

    Args:
        sweep: Runs of one model on one dataset with one amount of data.
        margin: Difference in points that does not matter.

    Attributes:
        order: The methods, the simplest first: those that leave the model as it is, then by trained parameters, and
            of about equally many the fastest.
        failed: The other methods, with the reason.
        base: The simplest method that no other is shown to be better than by possibly more than the margin.
        regret: The most in points by which another method may be better than this one; infinity if too little is known.
        decided: Whether this is at most the margin.
        winner: The recommended method. If nothing is decided, it is the simplest of those not beaten whose mean
            accuracy is within the margin of the best one.

    Raises:
        UserError: There are several models, datasets or amounts of data, or no method has a result.
    """

    def __init__(self, sweep: Sweep, margin: float) -> None:
        self.sweep, self.margin = sweep, margin
        budgets = [budget for budget in sweep.plan.budgets if budget != ZERO_SHOT]
        labels = {"model": [*sweep.plan.models], "dataset": [*sweep.plan.datasets], "amount of data": budgets}
        for what, names in labels.items():
            if len(names) != 1:
                raise UserError(f"A recommendation is for one {what}, and {sweep.folder} has {len(names)}.")
        (self.model,), (self.dataset,), (self.budget,) = labels.values()
        trained = [method for method in sweep.plan.methods if not is_zero_shot(method)]
        estimates = {method: sweep.estimate(self.key(method)) for method in trained}
        self.estimates = {method: estimate for method, estimate in estimates.items() if estimate}
        self.failed = {m: sweep.why_missing(self.key(m)) for m in trained if m not in self.estimates}
        if not self.estimates:
            reasons = "; ".join(f"{method} {why}" for method, why in self.failed.items())
            raise UserError(f"No method has a result: {reasons}.", where=str(sweep.folder))
        pairs = comparisons(sweep)
        self.pairs = {(one.first, one.second): one for pair in pairs for one in (pair, pair.turned())}
        tests = map(unpack_bits, sweep.finished[RIGHT])
        self.pictures = max((len(right) for right in tests if right is not None), default=0)
        self.order = self._by_cost()
        beaten = {
            method
            for one, method in permutations(self.order, 2)
            if self.better(one, method) and self.most(one, method) > margin
        }
        left = [method for method in self.order if method not in beaten] or self.order
        self.base = left[0]
        self.regret = max((self.most(other, self.base) for other in self.others(self.base)), default=inf)
        self.decided = self.regret <= margin
        best = max(self.estimates[method].mean for method in left)
        self.near = [method for method in left if best - self.estimates[method].mean <= margin]
        self.winner = self.base if self.decided else self.near[0]

    def key(self, method: str) -> Key:
        """Return the cell of a method."""
        return Key(self.model, self.dataset, self.budget, method)

    def others(self, method: str) -> list[str]:
        """Return the other methods with results."""
        return [other for other in self.order if other != method]

    def interval(self, method: str) -> tuple[float, float]:
        """Return the 95 % confidence interval of an accuracy in percent over test pictures (Wilson) and seeds."""
        mean, half = self.estimates[method].mean, self.estimates[method].half or 0.0
        count = max(self.pictures, 1)
        low, high = binomtest(round(count * mean / 100), count).proportion_ci(method="wilson")
        return max(0.0, mean - hypot(mean - 100 * low, half)), min(100.0, mean + hypot(100 * high - mean, half))

    def span(self, one: str, other: str) -> tuple[float, float] | None:
        """Return the interval in points of the gain by one method over another; all with the other hold together."""
        pair = self.pairs.get((one, other))
        return pair.span(len(self.order) - 1) if pair else None

    def better(self, one: str, other: str) -> bool:
        """Return True if one method is shown to be better than another, by the verdict and by the interval."""
        pair, span = self.pairs.get((one, other)), self.span(one, other)
        return bool(pair and span and pair.p is not None and pair.p < LEVEL and span[0] > 0)

    def most(self, one: str, other: str) -> float:
        """Return the most in points by which one method may be better; infinity if too little is known."""
        pair, span = self.pairs.get((one, other)), self.span(one, other)
        if pair is None or span is None or (pair.p is None and not pair.alike):
            return inf
        return max(0.0, span[1])

    @property
    def sentence(self) -> str:
        """Method to take, or what is undecided, and by how much."""
        return (self._decided() if self.decided else self._undecided()) + self._pretrained()

    @property
    def details(self) -> list[str]:
        """Reasons and limits of the sentence, one or two sentences each."""
        mean, (low, high) = self.estimates[self.winner].mean, self.interval(self.winner)
        on = many(self.pictures, "test picture") if self.pictures else "the test pictures"
        seeds = many(len(self.estimates[self.winner].values), "seed")
        details = [
            f"On {on}, {self._named(self.winner)} has {mean:.1f} %, the mean of {seeds}. On new pictures of this kind, "
            f"{low:.1f} to {high:.1f} % are possible."
        ]
        if slightly := [other for other in self.others(self.winner) if self.better(other, self.winner)]:
            small = f"Shown to be better, but by no more than the margin of {self.margin:g}"
            details.append(f"{small}: {', '.join(slightly)}.")
        runs = {method: self.sweep.runs[self.key(method)]["accuracy"] for method in self.order}
        lost = {method: f"{some.isna().sum()} of {len(some)} runs" for method, some in runs.items() if some.hasnans}
        if missing := [f"{method} ({why})" for method, why in (lost | self.failed).items()]:
            details.append(f"Left out, without a result: {', '.join(missing)}.")
        return details

    def _changes(self, method: str) -> bool:
        """Return True if a method changes the model, as its class says; a class of another program may."""
        return bool(getattr(getattr(methods, self.sweep.kinds[method], None), "updates", True))

    def _named(self, method: str) -> str:
        return method if self._changes(method) else f"the {method}"

    def _by_cost(self) -> list[str]:
        def seconds(method: str) -> float:
            known = self.sweep.select(**self.key(method)._asdict())["fit_seconds"]
            return fmean(known) if (known > 0).all() else inf

        cost = {m: (self._changes(m), self.sweep.parameters(self.model, m) or 0) for m in self.estimates}
        groups: list[list[str]] = []
        for method in sorted(cost, key=cost.__getitem__):
            changes, size = cost[groups[-1][0]] if groups else (None, 0)
            if changes == cost[method][0] and cost[method][1] <= EQUAL * size:
                groups[-1].append(method)
            else:
                groups.append([method])
        return [method for group in groups for method in sorted(group, key=seconds)]

    def _decided(self) -> str:
        winner, others = self.winner, self.others(self.winner)
        simpler = self.order[: self.order.index(winner)]
        wins = all(self.better(winner, other) for other in others)
        behind = others if wins else [method for method in simpler if self.better(winner, method)]
        spans = {method: span for method in behind if (span := self.span(winner, method))}
        reason = ""
        if spans:
            best = min(spans, key=lambda method: sum(spans[method]))
            low, high = spans[best]
            reason = f"it is {(low + high) / 2:.1f} ± {(high - low) / 2:.1f} points better than {self._named(best)}"
            if len(behind) > 1 and (wins or behind == simpler):
                reason += f", the best of the {'others' if wins else 'simpler ones'}"
        if not wins:
            reason += ", and " * bool(reason) + "nothing else" + " with a result" * bool(self.failed) + " is better"
            reason += " than it" * bool(spans)
            reason += f" by more than {ceil(10 * self.regret - 1e-9) / 10:.1f} points" if self.regret else ""
        return f"Take {self._named(winner)}: {reason}."

    def _undecided(self) -> str:
        base = self._named(self.base)
        pairs = [pair for other in self.others(self.base) if (pair := self.pairs.get((other, self.base)))]
        if not pairs:
            return f"Undecided: no other method has a result of the same seed to compare {base} with."
        rival = max(pairs, key=lambda pair: (self.most(pair.first, self.base), pair.difference.mean))
        start = f"Undecided: {self._named(rival.first)} against {base} is {formatted(rival.difference.mean)} points"
        span, crossed = self.span(rival.first, self.base), rival.crossed
        if span and crossed and isfinite(self.most(rival.first, self.base)):
            low, high = map(formatted, span)
            units = f"{many(crossed.samples, 'test picture')} and {many(crossed.runs, 'seed')}"
            start += f", and {low} to {high} are possible with {units}."
        else:
            alike = rival.untuned if EDGE in rival.untuned else "the learning rates were not searched alike"
            reasons = [alike] * bool(rival.untuned) + [rival.lacking.partition("; ")[0]] * bool(rival.lacking)
            start += f", without a verdict ({'; '.join(reasons or [rival.obstacle])})."
        why = "the simplest one near the best" if len(self.near) > 1 else "the best"
        return f"{start} If it must be one today, take {self._named(self.winner)}, {why} here."

    def _pretrained(self) -> str:
        zero, (low, high) = self.sweep.pretrained.get((self.model, self.dataset)), self.interval(self.winner)
        if zero is None or zero < low:
            return ""
        what = f"{self._named(self.winner)} is not shown to differ from the pretrained model ({zero:.1f} %)"
        if zero > high:
            what = f"the pretrained model has {zero:.1f} %, which is more"
        return f" But {what}. Train for more steps, or take it as it is."
