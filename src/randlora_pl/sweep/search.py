"""A search of options on validation samples; the test samples are left alone.

Candidates are tried with the first of the search's seeds, the two best also with the others: one run on few validation
samples is too noisy a judge between neighbours. A method's score is the mean over the models, datasets and budgets of
the search, so that it gets one rate for all of them, as in the paper.

By default the learning rate climbs: from a method's own rate and its two neighbours on while the best lies at an end of
what was tried, with one seed and then with all. The candidates depend on the scores alone, neither on a kill nor on the
number of processes. `grid` tries all values, and `tpe` leaves the choice to Optuna.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Any

from randlora_pl.adapters import methods
from randlora_pl.run.options import classes
from randlora_pl.run.options.compose import flatten, nested
from randlora_pl.sweep import (
    RATES,
    SweepConfig,
    Tree,
    budgets,
    is_zero_shot,
    members,
    shown,
    with_values,
    without_axes,
)
from randlora_pl.sweep.climb import FINALISTS, climbed
from randlora_pl.sweep.expand import task_of
from randlora_pl.sweep.folder import FAILED, OPEN, SweepFolder
from randlora_pl.sweep.plan import Cell, cell_config, digest, plan
from randlora_pl.tasks.objective import Objective
from randlora_pl.utils.errors import UserError, errors_in, near
from randlora_pl.utils.options import is_number

if TYPE_CHECKING:
    from randlora_pl.sweep.study import Pruning, Study

CLIMB, TPE = "climb", "tpe"

VALIDATED = {"limit_val_batches": 1.0, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
"""Options of the trainer: validation once, after the last step, on all validation samples."""
Values = tuple[Any, ...]
"""A candidate: a value of each option."""


class Search:
    """The search that the ``tune`` part of a sweep describes.

    Args:
        description: The sweep whose methods are tuned.
        folder: Folder of the search, with its cells and Optuna's study.

    Attributes:
        space: By option: a list of values; ``low``, ``high`` and ``log``; or None for factors of the own rate.
        names: By method: its names of the options, a learning rate first, and their names in the space.

    Raises:
        UserError: Something in the description is wrong.
    """

    def __init__(self, description: SweepConfig, folder: SweepFolder) -> None:
        tune = description.tune
        self.description, self.folder = description, folder
        given = flatten(nested(tune.get("set", {})))
        if wrong := [name for name in VALIDATED if f"trainer.{name}" in given]:
            raise UserError(f"tune.set has trainer.{wrong[0]}: a search validates at its own times. Remove it.")
        self.sampler, self.pruner = tune.get("sampler", CLIMB), tune.get("pruner", "")
        self.trials = tune.get("trials", 20)
        if self.sampler != TPE and (wrong := [name for name in ("pruner", "trials") if name in tune]):
            raise UserError(f"tune.{wrong[0]} needs sampler: tpe. Add it, or remove {wrong[0]}.")
        self.seeds = tune.get("seeds", [0])
        if both := set(self.seeds) & set(description.seeds):
            raise UserError(f"seeds and tune.seeds both contain {min(both)}; choose others for one of them.")
        chosen = tune.get("datasets") or list(description.datasets)
        members("tune.datasets", chosen, description.datasets, "datasets")
        self.small = replace(
            description,
            datasets={label: description.datasets[label] for label in chosen},
            budgets=budgets(tune["budgets"]) if tune.get("budgets") else description.budgets,
            options=description.options | tune.get("set", {}),
            methods={label: facts for label, facts in description.methods.items() if not is_zero_shot(label)},
        )
        tasks = (classes.task_of(self._tree(method)["model"]["class_path"]) for method in self.small.methods)
        kind = next(filter(None, tasks), Objective)
        self.monitor = tune.get("monitor", f"val/{kind.measure(kind.tuned_by).name}")
        self.measure = kind.measure(self.monitor.removeprefix("val/"))
        self.sign = -1 if self.measure.mode == "min" else 1
        searched = without_axes("tune.search", tune.get("search") or {RATES[0]: None})
        self.space = {str(option): _values(option, values, self.sampler) for option, values in searched.items()}
        self.names = {}
        for method in self.small.methods:  # not all have an alpha, and a linear probe has a head's rate
            tree = self._tree(method)
            adapter = str(flatten(tree)["model.adapter"]).rpartition(".")[2]
            rate = classes.rate_name(adapter, tree["model"]["class_path"].rpartition(".")[2])
            own = [option for option in self.space if option in (*RATES, *self._options(method)) or "." in option]
            names = {rate if option == RATES[0] else option: option for option in own}
            self.names[method] = dict(sorted(names.items(), key=lambda pair: pair[0] not in RATES))
        known = {option for names in self.names.values() for option in names.values()}
        if unknown := [option for option in self.space if option not in known]:
            options = [*RATES, *(name for method in self.names for name in self._options(method))]
            raise UserError(f"tune.search has {unknown[0]!r}, which no method has.{near(unknown[0], options)}")
        self._grids: dict[str, tuple[list[list[Any]], tuple[int, int] | None]] = {}
        self._cells: dict[tuple[str, Values, int], list[Cell]] = {}
        self._studies: dict[str, Study] = {}

    def _tree(self, method: str) -> Tree:
        facts = self.small.methods[method]
        with errors_in(f"methods.{method}"):
            model = next(model for model in self.small.models if method in self.small.methods_of(model))
            return cell_config(self.small.models[model], facts, self.small.options, None, untrained=False)

    def _options(self, method: str) -> list[str]:
        kind = getattr(methods, str(flatten(self._tree(method))["model.adapter"]).rpartition(".")[2], None)
        return list(inspect.signature(kind).parameters) if kind else []

    def restrict(self, group: str, labels: Sequence[str]) -> None:
        """Keep some models, datasets or methods, and the methods that a model is left for."""
        kept = {label: facts for label, facts in getattr(self.small, group).items() if label in labels}
        changed: dict[str, Any] = {group: kept}
        self.small = replace(self.small, **changed)
        left = {method for model in self.small.models for method in self.small.methods_of(model)}
        self.names = {method: names for method, names in self.names.items() if method in left}
        self._cells = {}

    def cells(self, method: str, values: Values, seed: int) -> list[Cell]:
        """Return the cells of a candidate with a seed."""
        key = (method, values, seed)
        if key not in self._cells:
            tried = dict(zip(self.names[method], values, strict=True))
            facts = with_values(self.small.methods[method], tried)
            part = replace(self.small, methods={f"{method} at {shown(tried)}": facts}, seeds=[seed])
            checks = VALIDATED | ({"val_check_interval": 0.25} if self.pruner else {})  # a pruner looks at it, too
            planned = plan(part, {"trainer": checks})
            self._cells[key] = [replace(cell, facts={"tunes": method, **tried}) for cell in planned]
        return self._cells[key]

    def _grid(self, method: str) -> tuple[list[list[Any]], tuple[int, int] | None]:
        """Return the values of each option of a method, and the ends of the rates to begin with, if not with all."""
        if method not in self._grids:
            grid = [self.space[option] for option in self.names[method].values()]
            if self.sampler != CLIMB or next(iter(self.names[method])) not in RATES:
                self._grids[method] = grid, None
                return grid, None
            name, tree = next(iter(self.names[method])), self._tree(method)
            rate = tree["model"].get("init_args", {}).get(name)
            own = float(getattr(task_of(tree), name) if rate is None else rate)  # the config's, or the default
            rates = [own * 2.0**power for power in range(-10, 11)] if grid[0] is None else grid[0]
            middle = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / own)))
            self._grids[method] = [rates, *grid[1:]], (max(middle - 1, 0), min(middle + 1, len(rates) - 1))
        return self._grids[method]

    def study(self, method: str) -> "Study":
        """Return Optuna's study of a method."""
        if method not in self._studies:
            from randlora_pl.sweep.study import Study

            space = {name: self.space[option] for name, option in self.names[method].items()}
            judged = [self.monitor, self.seeds[0], self.pruner, self.description.tune.get("set")]
            judged += [list(self.small.models), list(self.small.datasets), self.small.budgets]
            name = f"{method} {digest(space | {'': judged})}"  # scores of another search are not compared
            study = Study(self.folder.path, name, space, self.trials, self.sign < 0, self.seeds[0], self.pruner)
            study.ask(self._at_hand(method))
            self._studies[method] = study
        return self._studies[method]

    def candidates(self, method: str) -> list[Values]:
        """Return the candidates to try with the first seed, as far as is known by now."""
        if self.sampler == TPE:
            return list(dict.fromkeys(self.study(method).candidates())) if self._begun() else [self._at_hand(method)]
        (rates, *others), start = self._grid(method)
        if start is None:
            return list(product(rates, *others))
        tried: list[Values] = []
        for rest in product(*others):
            score = partial(lambda rest, rate: self.score(method, (rate, *rest), self.seeds[:1]), rest)
            low, high = climbed(rates, *start, score)
            tried += [(rate, *rest) for rate in rates[low : high + 1]]
        return sorted(tried, key=lambda values: values[0])

    def known(self, ask: bool = False) -> list[Cell]:
        """Return the cells to run, as far as is known by now.

        Args:
            ask: If True, Optuna begins another trial.
        """
        cells: list[Cell] = []
        for method in self.names:
            if self.sampler == TPE and self._begun():
                study = self.study(method)
                study.settle(partial(self.score, method, seeds=self.seeds[:1]))
                if ask and not study.full():
                    study.ask()
                    ask = False
            for values, seed in self._rounds(method):
                cells += [cell for cell in self.cells(method, values, seed) if not self.dropped(cell)]
        return cells

    def _rounds(self, method: str) -> list[tuple[Values, int]]:
        """Return the candidates that are known by now, each with its seeds."""
        first, *others = self.seeds
        tried = self.candidates(method)
        pairs = [(values, first) for values in tried]
        over = all(self.score(method, values, [first]) is not None for values in tried)
        if not over or (self.sampler == TPE and not (self._begun() and self.study(method).full())):
            return pairs
        finalists = self.best(method, tried, [first])[:FINALISTS]
        pairs += [(values, seed) for values in finalists for seed in others]
        over = all(self.score(method, values, self.seeds) is not None for values in finalists)
        best = self.best(method, finalists, self.seeds)
        if not over or not best or self.sampler != CLIMB or self._grid(method)[1] is None:
            return pairs
        rates, rest = self._grid(method)[0][0], best[0][1:]
        begun = [values[0] for values in tried if values[1:] == rest]

        def score(rate: float) -> float | None:
            lost = rate in begun and (rate, *rest) not in finalists
            return -math.inf if lost else self.score(method, (rate, *rest), self.seeds)

        # a winner without a neighbour on one side gets one there, and so on
        low, high = climbed(rates, rates.index(begun[0]), rates.index(begun[-1]), score)
        beyond = [(rate, *rest) for rate in rates[low : high + 1] if rate not in begun]
        return pairs + [(values, seed) for values in beyond for seed in self.seeds]

    def dropped(self, cell: Cell) -> bool:
        """Return True if a cell is not worth running, because its candidate has failed elsewhere."""
        cells = self.cells(*self._candidate(cell), cell.labels.seed)
        return self.folder.state(cell) == OPEN and any(self.folder.state(other) == FAILED for other in cells)

    def _candidate(self, cell: Cell) -> tuple[str, Values]:
        method = cell.facts["tunes"]
        return method, tuple(cell.facts[name] for name in self.names[method])

    def _begun(self) -> bool:
        """Return True if the folder has been opened for the search; before, nothing is written to it."""
        return (self.folder.path / self.folder.file).is_file()

    def _at_hand(self, method: str) -> Values:
        """Return the candidate that Optuna's first trial is: the method's own values where they are in the space."""
        flat = {name.removeprefix("model.adapter."): value for name, value in flatten(self._tree(method)).items()}
        flat |= {name: flat.get(f"model.{name}") for name in RATES}
        own_values = []
        for name, option in self.names[method].items():
            space, own = self.space[option], flat.get(name)
            low, high = (space[0], space[-1]) if isinstance(space, list) else (space["low"], space["high"])
            inside = own in space if isinstance(space, list) else isinstance(own, type(low)) and low <= own <= high
            own_values.append(own if inside else low)
        return tuple(own_values)

    def finished(self) -> bool:
        """Return True if all rounds are over, and Optuna has no candidate left to select."""
        if self.sampler == TPE and not all(self._begun() and self.study(method).full() for method in self.names):
            return False
        return all(self.folder.state(cell) != OPEN for cell in self.known())

    def watcher(self, cell: Cell) -> "Pruning | None":
        """Return the callback that may end a cell early."""
        if not self.pruner or cell.labels.seed != self.seeds[0]:
            return None
        method, values = self._candidate(cell)
        hashes = [other.hash for other in self.cells(method, values, cell.labels.seed)]
        return self.study(method).watcher(values, hashes.index(cell.hash), self.monitor)

    def score(self, method: str, values: Values, seeds: Sequence[int]) -> float | None:
        """Return the mean metric of a candidate, or minus the loss; None while cells are open.

        Minus infinity stands for a candidate that failed.
        """
        cells = [cell for seed in seeds for cell in self.cells(method, values, seed)]
        states = {self.folder.state(cell) for cell in cells}
        if FAILED in states:
            return -math.inf
        if OPEN in states:
            return None
        metrics = [self.folder.results(cell).get(self.monitor) for cell in cells]
        numbers = [float(metric) for metric in metrics if isinstance(metric, int | float)]
        return self.sign * fmean(numbers) if len(numbers) == len(cells) else -math.inf

    def scores(self, method: str, candidates: Sequence[Values], seeds: Sequence[int]) -> dict[Values, float]:
        """Return the scores of the candidates that have worked with these seeds."""
        known = {values: self.score(method, values, seeds) for values in candidates}
        return {values: score for values, score in known.items() if score is not None and score > -math.inf}

    def best(self, method: str, candidates: Sequence[Values], seeds: Sequence[int]) -> list[Values]:
        """Return the candidates that have worked, the best first; of equal ones the first."""
        scores = self.scores(method, candidates, seeds)
        return sorted(scores, key=lambda values: -scores[values])

    def tried(self, method: str) -> list[Values]:
        """Return every candidate that is known by now."""
        candidates = list(dict.fromkeys(values for values, _ in self._rounds(method)))
        return sorted(candidates, key=lambda values: values[0]) if self.sampler == CLIMB else candidates

    def chosen(self) -> dict[str, Tree]:
        """Return the best candidate of each method; a method none of whose candidates worked is left out."""
        return {
            method: dict(zip(names, values, strict=True))
            for method, names in self.names.items()
            for values in self.best(method, self.tried(method), self.seeds)[:1]
        }

    def report(self) -> Tree:
        """Everything that was tried, JSON-ready: the provenance of the rates."""
        chosen, entries = self.chosen(), {}
        for method in self.names:
            begun = []
            for values in self.tried(method):
                scores = {seed: self.scores(method, [values], [seed]).get(values) for seed in self.seeds}
                means = {str(seed): self.sign * score for seed, score in scores.items() if score is not None}
                cells = [cell for seed in self.seeds for cell in self.cells(method, values, seed)]
                reason = next(filter(None, (self.folder.failure(cell).get("reason") for cell in cells)), None)
                if means or reason:
                    entry = dict(zip(self.names[method], values, strict=True)) | {self.monitor: means}
                    begun.append(entry | ({"failed": reason} if reason else {}))
            facts = self.description.methods[method]
            entries[method] = {"method": facts, "chosen": chosen.get(method), "tried": begun}
        return {
            "finished": self.finished(),
            "split": "val",
            "monitor": self.monitor,
            "seeds": self.seeds,
            "finalists": FINALISTS,
            "sampler": self.sampler,
            **({"trials": self.trials, "pruner": self.pruner} if self.sampler == TPE else {}),
            "models": {model: self.description.models[model] for model in self.small.models},
            "datasets": list(self.small.datasets),
            "budgets": self.small.budgets,
            "set": self.description.tune.get("set", {}),
            "methods": entries,
        }

    def remarks(self) -> list[str]:
        """Return remarks on best rates at the edge of what was tried, and on methods of which all rates are equal."""
        edges, flat = [], []
        for method, values in self.chosen().items():
            (name, rate), *_ = values.items()
            tried = self.tried(method)
            scores = self.scores(method, tried, self.seeds[:1])
            rates = [candidate[0] for candidate in tried]
            if name in RATES and len(set(rates)) > 1 and rate in (min(rates), max(rates)):
                edges.append(f"{method} ({rate:g})")
            if len(scores) > 1 and len(set(scores.values())) == 1:
                flat.append(method)
        beyond = f"Best at the edge of what was tried, so a better rate may lie beyond it: {', '.join(edges)}"
        equal = f"All candidates are equally good, so none can be selected: {', '.join(flat)}. Train for more steps."
        return [beyond] * bool(edges) + [equal] * bool(flat)

    def tuned(self) -> SweepConfig:
        """Return the description with the best candidates in it."""
        chosen, given = self.chosen(), self.description.methods
        return replace(
            self.description, methods={label: with_values(given[label], chosen.get(label, {})) for label in given}
        )


def _values(option: str, values: Any, sampler: str) -> Any:
    """Return the values of an option, checked: a list without doubles, in rising order if it has numbers."""
    where = f"tune.search.{option}"
    numbers = [value for value in (values.values() if isinstance(values, dict) else values or []) if is_number(value)]
    match values:
        case None if option == RATES[0] and sampler == CLIMB:
            return None
        case [_, *_] if len(numbers) == len(values):
            if option in RATES and min(numbers) <= 0:
                raise UserError(f"{where} is {values!r}: give positive numbers.")
            return sorted({float(value) if option in RATES else value for value in numbers})
        case [_, *_] if all(isinstance(value, str | int | float | None) for value in values):
            return list(dict.fromkeys(values))
        case {"low": low, "high": high, **more} if (
            is_number(low) and is_number(high) and low < high and (more.keys() <= {"log"})
        ):
            if sampler != TPE:
                raise UserError(f"{where} is a range, which needs sampler: tpe. Add it, or give a list of values.")
            return {"low": low, "high": high, "log": bool(more.get("log", low > 0))}
    raise UserError(f"{where} is {values!r}: give a list of values, or {{low: 1e-4, high: 1e-1}} with sampler: tpe.")
