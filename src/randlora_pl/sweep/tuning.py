"""A search of learning rates (and alphas) on validation images; the test images are left alone.

Every candidate, or with ``climb`` those around a method's own rate and on towards better ones, is tried with the first
of the search's seeds, the two best also with the others: one run on few validation images is too noisy a judge between
neighbours. If the winner then has no neighbour on one side, the search climbs on there. A method's score is the mean
over the models, datasets and budgets of the search, so that it gets one rate for all of them, as in the paper.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

from randlora_pl.run.options.compose import flatten, nested
from randlora_pl.sweep.choice import best_of, climb, searched
from randlora_pl.sweep.description import SweepConfig, Tree, budgets, is_zero_shot
from randlora_pl.sweep.folder import SweepFolder
from randlora_pl.sweep.plan import Trial, plan
from randlora_pl.sweep.planned import whole_numbers
from randlora_pl.utils.errors import UserError, near

FINALISTS = 2
VALIDATED = {"trainer": {"limit_val_batches": 1.0, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}}
"""Validation once, after the last step, on all validation images."""

_SEARCHED = ("model", "dataset", "budget")

Values = tuple[float, ...]
"""A candidate: a learning rate, and an alpha where one is searched."""


@dataclass
class Search:
    """A search.

    Attributes:
        description: The sweep whose methods are tuned.
        names: By method: what is searched, ``learning_rate`` or ``head_learning_rate``, and ``alpha``.
        candidates: By method: what is tried.
        seeds: Seeds of the search, none of them the sweep's.
        climbs: Whether rates are tried from each method's own on, instead of all.
        monitor: Metric of the validation that decides; of a loss the lowest is the best.
        cells: By method and candidate, for each seed.
    """

    description: SweepConfig
    names: dict[str, tuple[str, ...]]
    candidates: dict[str, list[Values]]
    seeds: list[int]
    climbs: bool = False
    monitor: str = "val/acc"
    cells: dict[tuple[str, Values, int], list[Trial]] = field(default_factory=dict)

    @classmethod
    def of(cls, description: SweepConfig) -> "Search":
        """Return the search that the ``tune`` part of a description describes.

        Raises:
            UserError: There is nothing to try, or something in it is wrong.
        """
        tune = description.tune
        rates, alphas = _numbers("learning_rates", tune), _numbers("alphas", tune)
        given = flatten(nested(tune.get("set", {})))
        if wrong := [name for name in flatten(VALIDATED) if name in given]:
            raise UserError(
                f"tune.set has {wrong[0]}: a search validates once, on all validation samples. Remove it from tune.set."
            )
        if not rates:
            raise UserError("tune.learning_rates is missing: give the rates to try, such as [1e-4, 1e-3, 1e-2].")
        seeds = whole_numbers("tune.seeds", tune.get("seeds", [0]))
        if both := set(seeds) & set(description.seeds):
            raise UserError(f"seeds and tune.seeds both contain {min(both)}; choose others for one of them.")
        small = replace(
            description,
            datasets=_some("datasets", tune, description.datasets),
            budgets=budgets(tune["budgets"]) if tune.get("budgets") else description.budgets,
            seeds=seeds,
            options=description.options | tune.get("set", {}),
        )
        names = {m: searched(small, m, alphas) for m in small.methods if not is_zero_shot(m)}
        climbs = tune.get("climb", False)
        if not isinstance(climbs, bool):
            raise UserError(f"tune.climb is {climbs!r}: give true or false.")
        if not str(monitor := tune.get("monitor", "val/acc")).startswith("val/"):
            raise UserError(f"tune.monitor is {monitor!r}: give a metric of the validation, such as val/loss.")
        found = cls(description, names, {}, seeds, climbs, str(monitor))
        for method, parts in names.items():
            found.candidates[method] = list(product(rates, *([alphas] if "alpha" in parts else [])))
            for values in found.candidates[method]:
                found._add(small, method, values)
        return found

    def _add(self, small: SweepConfig, method: str, values: Values) -> None:
        """Make the cells of one candidate."""
        tried = dict(zip(self.names[method], values, strict=True))
        label = f"{method} at {', '.join(f'{name} {value:g}' for name, value in tried.items())}"
        for cell in plan(replace(small, methods={label: small.methods[method] | tried}), VALIDATED):
            cell = replace(cell, facts={"tunes": method, **tried})
            self.cells.setdefault((method, values, cell.labels.seed), []).append(cell)

    def restrict(self, filters: Sequence[str]) -> None:
        """Keep the methods that ``method=NAME[,NAME]`` filters choose, all without one; a UserError names others."""
        chosen = [name for option in filters for name in _names(option.partition("=")[2], self.names)]
        if chosen:
            self.names = {method: parts for method, parts in self.names.items() if method in chosen}
            self.cells = {key: cells for key, cells in self.cells.items() if key[0] in chosen}

    def keep(self, pairs: set[tuple[str, str]]) -> None:
        """Keep the cells of these models and datasets, and the methods that have any."""
        for key, cells in self.cells.items():
            self.cells[key] = [cell for cell in cells if (cell.labels.model, cell.labels.dataset) in pairs]
        self.cells = {key: cells for key, cells in self.cells.items() if cells}
        left = {method for method, _, _ in self.cells}
        self.names = {method: parts for method, parts in self.names.items() if method in left}

    def first(self, folder: SweepFolder) -> list[Trial]:
        """Return the candidates to try, with the first seed; where the search climbs, as far as is known by now."""
        tried = {(method, values) for method in self.names for values in self._tried(folder, method)}
        return [
            cell
            for (method, values, seed), cells in self.cells.items()
            if seed == self.seeds[0] and (method, values) in tried
            for cell in cells
        ]

    def _tried(self, folder: SweepFolder, method: str) -> list[Values]:
        if not self.climbs:
            return self.candidates[method]
        rates = sorted({values[0] for values in self.candidates[method]})
        own = self.description.methods[method].get(self.names[method][0], rates[len(rates) // 2])
        found = []
        for rest in dict.fromkeys(values[1:] for values in self.candidates[method]):  # for each alpha
            score = partial(self._known, folder, method, rest)
            found += [(rate, *rest) for rate in climb(rates, own, score)]
        return found

    def _known(self, folder: SweepFolder, method: str, rest: Values, rate: float) -> float | None:
        """Return the score of a candidate with the first seed; minus infinity if a cell failed, None if one is open."""
        cells = self.cells[method, (rate, *rest), self.seeds[0]]
        if not folder.settled(cells):
            return None
        score = self._score(folder, cells)
        return -math.inf if score is None else score

    def all_cells(self) -> list[Trial]:
        """Return every candidate with every seed, of which the search runs a part."""
        return [cell for cells in self.cells.values() for cell in cells]

    def second(self, folder: SweepFolder) -> list[Trial]:
        """Return the finalists with the other seeds, and what is tried beyond them; empty in the first round."""
        first = {method: self._tried(folder, method) for method in self.names}
        if not all(folder.settled(self.cells[m, v, self.seeds[0]]) for m, tried in first.items() for v in tried):
            return []
        chosen = []
        for method, tried in first.items():
            scores = self.scores(folder, method, self.seeds[:1])
            finalists = best_of({values: scores[values] for values in tried if values in scores}, FINALISTS)
            cells = [
                cell for values in finalists for seed in self.seeds[1:] for cell in self.cells[method, values, seed]
            ]
            chosen += cells
            if self.climbs and folder.settled(cells):
                chosen += self._beyond(folder, method, tried)
        return chosen

    def _beyond(self, folder: SweepFolder, method: str, first: list[Values]) -> list[Trial]:
        """Return cells of the rates next to a winner that has no neighbour on one side, with every seed."""
        rates, tried = sorted({values[0] for values in self.candidates[method]}), list(first)
        found: list[Trial] = []
        while folder.settled(found) and (best := best_of(self.scores(folder, method, self.seeds), 1)):
            rate, *rest = best[0]
            place = rates.index(rate)
            beside = [(near, *rest) for near in rates[max(place - 1, 0) : place + 2]]
            lacking = [values for values in beside if values not in tried]
            if not lacking:
                break
            tried += lacking
            found += [cell for values in lacking for seed in self.seeds for cell in self.cells[method, values, seed]]
        return found

    def finished(self, folder: SweepFolder) -> bool:
        """Return True if both rounds are over."""
        return folder.settled(self.first(folder) + self.second(folder))

    def scores(self, folder: SweepFolder, method: str, seeds: Sequence[int]) -> dict[Values, float]:
        """Return the mean accuracy, or minus the loss, of candidates whose cells with these seeds are all finished."""
        found = {}
        for values in self.candidates[method]:
            cells = [cell for seed in seeds for cell in self.cells[method, values, seed]]
            if (score := self._score(folder, cells)) is not None:
                found[values] = score
        return found

    def _score(self, folder: SweepFolder, cells: Sequence[Trial]) -> float | None:
        metrics = [metric for cell in cells if (metric := self.metric(folder, cell)) is not None]
        sign = -1 if self.monitor.endswith("loss") else 1
        return sign * fmean(metrics) if metrics and len(metrics) == len(cells) else None

    def metric(self, folder: SweepFolder, cell: Trial) -> float | None:
        """Return the deciding metric of a finished cell."""
        found = folder.results(cell).get(self.monitor)
        return float(found) if isinstance(found, int | float) else None

    def chosen(self, folder: SweepFolder) -> dict[str, dict[str, float]]:
        """Return the best candidate of each method; a method none of whose candidates worked is left out."""
        best = {}
        for method, names in self.names.items():
            if found := best_of(self.scores(folder, method, self.seeds), 1):
                best[method] = dict(zip(names, found[0], strict=True))
        return best

    def report(self, folder: SweepFolder, made: Tree | None = None) -> dict[str, Any]:
        """Everything that was tried, JSON-ready: the provenance of the rates."""
        chosen = self.chosen(folder)
        methods = {}
        for method, names in self.names.items():
            tried = []
            for values in self.candidates[method]:
                cells = {seed: self.cells[method, values, seed] for seed in self.seeds}
                metrics = {seed: [self.metric(folder, cell) for cell in row] for seed, row in cells.items()}
                whole = {
                    str(seed): [f for f in row if f is not None] for seed, row in metrics.items() if None not in row
                }
                means = {str(seed): fmean(row) for seed, row in whole.items() if row}
                reasons = [folder.failure(cell).get("reason") for row in cells.values() for cell in row]
                if self.climbs and not means and not any(reasons):
                    continue
                entry: Tree = dict(zip(names, values, strict=True)) | {self.monitor: means}
                tried.append(entry | ({"failed": reason} if (reason := next(filter(None, reasons), None)) else {}))
            facts = self.description.methods[method]
            methods[method] = {"method": facts, "chosen": chosen.get(method), "tried": tried}
        every = self.all_cells()
        searched = {name: list(dict.fromkeys(getattr(cell.labels, name) for cell in every)) for name in _SEARCHED}
        return (made or {}) | {
            "finished": self.finished(folder),
            "split": "val",
            "monitor": self.monitor,
            "seeds": self.seeds,
            "finalists": FINALISTS,
            "climb": self.climbs,
            "models": {model: self.description.models[model] for model in searched["model"]},
            "datasets": searched["dataset"],
            "budgets": searched["budget"],
            "set": self.description.tune.get("set", {}),
            "methods": methods,
        }

    def edges(self, folder: SweepFolder) -> list[str]:
        """Return methods whose best rate is the least or the greatest tried, so that a better one may lie beyond."""
        found = []
        for method, values in self.chosen(folder).items():
            cells = {tried: self.cells[method, tried, self.seeds[0]] for tried in self.candidates[method]}
            rates = {tried[0] for tried in cells if folder.settled(cells[tried])}
            rate = values[self.names[method][0]]
            if len(rates) > 1 and rate in (min(rates), max(rates)):
                found.append(f"{method} ({rate:g})")
        return found

    def flat(self, folder: SweepFolder) -> list[str]:
        """Return methods all of whose candidates did equally well, so that the search cannot choose."""
        scores = {method: self.scores(folder, method, self.seeds[:1]) for method in self.names}
        return [method for method, found in scores.items() if len(found) > 1 and len(set(found.values())) == 1]

    def tuned(self, folder: SweepFolder) -> SweepConfig:
        """Return the description with the best candidates in it."""
        chosen = self.chosen(folder)
        methods = {label: facts | chosen.get(label, {}) for label, facts in self.description.methods.items()}
        return replace(self.description, methods=methods)


def _names(text: str, known: Mapping[str, Any]) -> list[str]:
    names = [text] if text in known else text.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"--only method={text}: method {name!r} is not tuned here.{near(name, known)}")
    return names


def _numbers(name: str, tune: Tree) -> list[float]:
    values = tune.get(name, [])
    good = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values
    )
    if not good:
        raise UserError(f"tune.{name} is {values!r}: expected a list of positive numbers.")
    return sorted({float(value) for value in values})


def _some(name: str, tune: Tree, known: dict[str, Tree]) -> dict[str, Tree]:
    chosen = tune.get(name) or list(known)
    if not isinstance(chosen, list):
        raise UserError(f"tune.{name} is {chosen!r}: expected a list of labels.")
    for label in chosen:
        if label not in known:
            raise UserError(f"tune.{name} has {label!r}, which is none of the {name}.{near(str(label), known)}")
    return {label: known[label] for label in chosen}
