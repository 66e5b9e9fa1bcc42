"""Contest of the methods for one dataset, and the recommendation that follows from it.

The simplest method is recommended unless another one is shown to be better. All tests and intervals are from
`comparisons`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from statistics import fmean

from randlora_pl.adapters import methods
from randlora_pl.lab.report import formatted, many
from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.comparisons import EQUAL, LEVEL, Versus, comparisons
from randlora_pl.sweep import is_zero_shot
from randlora_pl.utils.errors import UserError


@dataclass(frozen=True)
class Advice:
    """A recommendation.

    Attributes:
        sentence: What to take, or what is undecided, and by how much.
        details: Its reasons and limits, a sentence or two each.
        winner: The method to take today, also if nothing is decided.
        decided: Whether the runs show it.
    """

    sentence: str
    details: list[str]
    winner: str
    decided: bool


class Contest:
    """The trained methods of a sweep that have results, compared with each other.

    Args:
        sweep: Runs of one model on one dataset with one amount of data.
        margin: Difference in points that does not matter.

    Attributes:
        order: The methods, the simplest first: those that leave the model as it is, then by trained parameters, and
            of about equally many the fastest.
        failed: The other methods, with the reason.
        base: The simplest method that no other is shown to be better than by possibly more than the margin.
        wins: Whether this one is shown to be better than every other.
        decided: Whether it wins, or no other method can be better by more than the margin.
        winner: The recommended method. If nothing is decided, it is the simplest of those not beaten whose mean
            accuracy is within the margin of the best one.

    Raises:
        UserError: There are several models, datasets or amounts of data, or no method has a result.
    """

    def __init__(self, sweep: Sweep, margin: float) -> None:
        self.sweep, self.margin = sweep, margin
        self.model = _only(list(sweep.plan.models), "model", sweep)
        self.dataset = _only(list(sweep.plan.datasets), "dataset", sweep)
        self.budget = _only(sweep.trained_budgets(self.model), "amount of data", sweep)
        trained = [method for method in sweep.plan.methods if not is_zero_shot(method)]
        finished = [method for method in trained if sweep.by_seed(self.key(method))]
        self.failed = {m: sweep.why_missing(self.key(m)) for m in trained if m not in finished}
        if not finished:
            reasons = "; ".join(f"{method} {why}" for method, why in self.failed.items())
            raise UserError(f"No method has a result: {reasons}.", where=str(sweep.folder))
        found = comparisons(sweep)
        self.pairs = {(one.first, one.second): one for pair in found for one in (pair, pair.turned())}
        self.order = self._by_cost(finished)
        left = [method for method in self.order if not self._beaten(method)] or self.order
        self.base, others = left[0], self.others(left[0])
        self.wins = bool(others) and all(self.better(self.base, other) for other in others)
        self.decided = bool(others) and (self.wins or self.regret(self.base) <= margin)
        means = {method: fmean(sweep.by_seed(self.key(method)).values()) for method in left}
        near = [method for method in left if max(means.values()) - means[method] <= margin]
        self.winner = self.base if self.decided else near[0]

    @property
    def points(self) -> str:
        """The margin as text."""
        return f"{self.margin:g} point{'s' * (self.margin != 1)}"

    def key(self, method: str) -> Key:
        """Return the cell of a method."""
        return Key(self.model, self.dataset, self.budget, method)

    def others(self, method: str) -> list[str]:
        """Return the other methods with results."""
        return [other for other in self.order if other != method]

    def named(self, method: str) -> str:
        """Return a method for a sentence, with an article if it leaves the model as it is, like a probe."""
        return method if self._changes(method) else f"the {method}"

    def seconds(self, method: str) -> float:
        """Return the mean time of a run in seconds; infinity if it is unknown."""
        seconds = self.sweep.select(**self.key(method)._asdict())["fit_seconds"]
        return fmean(known) if len(known := seconds[seconds > 0]) else inf

    def span(self, one: str, other: str) -> tuple[float, float] | None:
        """Return the interval in points of the gain by one method over another; all with the other hold together."""
        pair = self.pairs.get((one, other))
        return pair.span(len(self.order) - 1) if pair else None

    def better(self, one: str, other: str) -> bool:
        """Return True if one method is shown to be better than another."""
        pair = self.pairs.get((one, other))
        return pair is not None and pair.p is not None and pair.p < LEVEL and pair.difference.mean > 0

    def most(self, one: str, other: str) -> float:
        """Return the most in points by which one method may be better; infinity if too little is known."""
        pair, span = self.pairs.get((one, other)), self.span(one, other)
        if pair is None or span is None or (pair.p is None and not pair.alike):
            return inf
        return max(0.0, span[1])

    def regret(self, method: str) -> float:
        """Return the most in points by which any other method may be better."""
        return max((self.most(other, method) for other in self.others(method)), default=0.0)

    def advice(self) -> Advice:
        """Return the recommendation."""
        sentence = self._decided() if self.decided else self._undecided()
        details = [self._measured(), *([] if self.decided else self._what_decides())]
        if slightly := [other for other in self.others(self.winner) if self.better(other, self.winner)]:
            names = ", ".join(slightly)
            details.append(f"Shown to be better, but by less than the margin of {self.points}: {names}.")
        if self.failed:
            reasons = ", ".join(f"{method} ({why})" for method, why in self.failed.items())
            details.append(f"Left out, without a result: {reasons}.")
        return Advice(f"{sentence} {self._pretrained()}".strip(), details, self.winner, self.decided)

    def _changes(self, method: str) -> bool:
        """Return True if a method changes the model, as its class says; a class of another program may."""
        return bool(getattr(getattr(methods, self.sweep.kinds[method], None), "updates", True))

    def _by_cost(self, finished: Sequence[str]) -> list[str]:
        cost = {method: (self._changes(method), self.sweep.parameters(self.model, method) or 0) for method in finished}
        groups: list[list[str]] = []
        for method in sorted(finished, key=cost.__getitem__):
            changes, size = cost[groups[-1][0]] if groups else (None, 0)
            if changes == cost[method][0] and cost[method][1] <= EQUAL * size:
                groups[-1].append(method)
            else:
                groups.append([method])
        return [method for group in groups for method in sorted(group, key=self.seconds)]

    def _beaten(self, method: str) -> bool:
        """Return True if another method is shown to be better, and may be better by more than the margin."""
        others = self.others(method)
        return any(self.better(other, method) and self.most(other, method) > self.margin for other in others)

    def _decided(self) -> str:
        winner, regret, wins = self.winner, self.regret(self.winner), self.wins
        simpler = self.order[: self.order.index(winner)]
        behind = self.others(winner) if wins else [method for method in simpler if self.better(winner, method)]
        if not behind:
            reason = "nothing else is better"
        else:
            spans = {method: span for method in behind if (span := self.span(winner, method))}
            best = min(spans, key=lambda method: sum(spans[method]))
            low, high = spans[best]
            reason = f"it is {(low + high) / 2:.1f} ± {(high - low) / 2:.1f} points better than {self.named(best)}"
            if len(behind) > 1 and (wins or behind == simpler):
                reason += f", the best of the {'others' if wins else 'simpler ones'}"
            reason += "" if wins else ", and nothing else is better than it"
        if not wins and regret:
            reason += f" by more than {ceil(10 * regret - 1e-9) / 10:.1f} points"
        return f"Take {self.named(winner)}: {reason}."

    def _rival(self) -> Versus | None:
        """Return the pair of the simplest method with the one that may be better by most; None without common seeds."""
        here = [pair for other in self.others(self.base) if (pair := self.pairs.get((other, self.base)))]
        key = lambda pair: (self.most(pair.first, self.base), pair.difference.mean)  # noqa: E731
        return max(here, key=key, default=None)

    def _undecided(self) -> str:
        base, rival = self.named(self.base), self._rival()
        if rival is None:
            return f"Undecided: no other method has a result of the same seed to compare {base} with."
        start = f"Undecided: {self.named(rival.first)} against {base} is {formatted(rival.difference.mean)} points"
        span, crossed = self.span(rival.first, self.base), rival.crossed
        if span and crossed and isfinite(self.most(rival.first, self.base)):
            low, high = map(formatted, span)
            units = f"{many(crossed.samples, 'test picture')} and {many(crossed.runs, 'seed')}"
            start += f", and {low} to {high} are possible with {units}."
        else:
            start += f", without a verdict ({obstacles(rival)[0]})."
        if self.winner == rival.first:
            why = ", the better one here"
        elif self.winner != self.base:
            why = ", the simplest one near the best here"
        else:
            why = ", the simpler one" if self.order.index(self.base) < self.order.index(rival.first) else ""
        return f"{start} If it must be one today, take {self.named(self.winner)}{why}."

    def _what_decides(self) -> list[str]:
        """Return about how many test pictures or seeds would be enough if the difference stays as it is."""
        rival = self._rival()
        crossed, span = (rival.crossed, self.span(rival.first, self.base)) if rival else (None, None)
        if rival is None or crossed is None or span is None or self.most(rival.first, self.base) == inf:
            return []
        # an interval that is this narrow excludes either zero or what matters
        room = max(crossed.mean, self.margin - crossed.mean)
        if room <= 0:
            return ["No number of test pictures shows that two methods are exactly equal. Set a --margin above 0."]
        half, total = span[1] - crossed.mean, crossed.error**2
        factor = max(1.1, half / room if rival.alike else (half / room) ** 2)
        units = {"test pictures": (crossed.samples, crossed.of_samples), "seeds": (crossed.runs, crossed.of_runs)}
        larger = "test pictures" if rival.alike else max(units, key=lambda unit: units[unit][1])
        left = total / factor - (total - units[larger][1])  # of the larger variance, while the smaller one stays
        if rival.alike:
            more = {larger: factor}
        elif 2 * factor * left > units[larger][1]:
            more = {larger: units[larger][1] / left}
        else:
            more = dict.fromkeys(units, factor)
        counts = [f"{float(f'{ceil(units[unit][0] * share):.2g}'):,.0f} {unit}" for unit, share in more.items()]
        return [f"About {' and '.join(counts)} would decide it, if the difference stays the same."]

    def _measured(self) -> str:
        estimate = self.sweep.estimate(self.key(self.winner))
        counts = {pair.crossed.samples for pair in self.pairs.values() if pair.crossed}
        on = many(max(counts), "test picture") if counts else "the test pictures"
        mean, seeds = (estimate.mean, len(estimate.values)) if estimate else (0.0, 0)
        text = f"On {on}, {self.named(self.winner)} has {mean:.1f} %, the mean of {many(seeds, 'seed')}."
        return f"{text} That holds for new pictures of this kind."

    def _pretrained(self) -> str:
        """Return the comparison with the model before the training, if it matters."""
        zero, key = self.sweep.pretrained.get((self.model, self.dataset)), self.key(self.winner)
        estimate = self.sweep.estimate(key)
        if zero is None or estimate is None:
            return ""
        mend = "Train for more steps, or take it as it is."
        if zero > estimate.mean + (estimate.half or 0):
            return f"But the pretrained model has {zero:.1f} %, which is more. {mend}"
        if not self.sweep.idle(key):
            return ""
        every = all(self.sweep.idle(self.key(method)) for method in self.order)
        who = "no method is" if every else f"{self.named(self.winner)} is not"
        return f"But {who} shown to differ from the pretrained model ({zero:.1f} %). {mend}"


def obstacles(pair: Versus) -> list[str]:
    """Return the reasons for a missing verdict; what more runs and pictures mend comes first."""
    reasons = [*filter(None, pair.lacking.split("; ")), *([f"not tuned: {pair.untuned}"] if pair.untuned else [])]
    return reasons or [pair.obstacle]


def _only(labels: Sequence[str], what: str, sweep: Sweep) -> str:
    if len(labels) != 1:
        raise UserError(f"A recommendation is for one {what}, and {sweep.folder} has {len(labels)}.")
    return labels[0]
