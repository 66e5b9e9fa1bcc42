"""A search of options on validation samples; the test samples are left alone.

Candidates are tried with the first of the search's seeds, the best of them also with the others: one run on few
validation samples is too noisy a judge between neighbours. A method's score is the mean over the models, datasets and
budgets of the search, so that it gets one rate for all of them, as in the paper.

By default the learning rates climb from a method's own ones, the adapter's and a trained head's alternately.
All methods have equal numbers of trials, until the best of each has a lower and a higher neighbour in each rate. Among
the candidates within one standard error of the best, the lowest rates are chosen, so that no method runs one step below
divergence. With the rule ``best`` one rate climbs, and the best is chosen. The candidates depend on the scores alone,
neither on a kill nor on the number of processes. `grid` tries all values, and `tpe` leaves the choice to Optuna.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice, product
from statistics import fmean
from typing import TYPE_CHECKING, Any

from randlora_pl.adapters import methods
from randlora_pl.run.options import classes
from randlora_pl.run.options.compose import flatten, nested
from randlora_pl.sweep import (
    BEST,
    HEAD,
    LOWEST,
    RATE,
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
from randlora_pl.sweep.climb import FINALISTS, Climb, Point, Values, advance_together, climbed, lowest
from randlora_pl.sweep.expand import kind_of, task_of
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


class Search:
    """The search that the ``tune`` part of a sweep describes.

    Args:
        description: The sweep whose methods are tuned.
        folder: Folder of the search, with its cells and Optuna's study.

    Attributes:
        space: By option: a list of values; ``low``, ``high`` and ``log``; or None for factors of the own rate.
        names: By method: its names of the options, learning rates first, and their names in the space.

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
        climbs = self.sampler == CLIMB and {*RATES} & {*(tune.get("search") or RATES)}
        self.rule = tune.get("rule", LOWEST if climbs else BEST)
        self.trials = tune.get("trials", 20)
        for name, fits in (("pruner", self.sampler == TPE), ("rule", self.sampler == CLIMB)):
            if name in tune and not fits:
                needed = TPE if name == "pruner" else CLIMB
                raise UserError(f"tune.{name} needs sampler: {needed}. Add it, or remove {name}.")
        if "trials" in tune and self.sampler != TPE and self.rule != LOWEST:
            raise UserError("tune.trials needs sampler: tpe, or climb with rule: lowest. Add it, or remove trials.")
        self.seeds = tune.get("seeds") or list(islice((seed for seed in count() if seed not in description.seeds), 3))
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
        self._configs: dict[str, list[Tree]] = {}
        kind = next((self._tasks(method)[0] for method in self.small.methods), Objective)
        self.monitor = tune.get("monitor", f"val/{kind.measure(kind.tuned_by).name}")
        self.measure = kind.measure(self.monitor.removeprefix("val/"))
        self.sign = -1 if self.measure.mode == "min" else 1
        head = self.rule == LOWEST and any(self._head(method) is not None for method in self.small.methods)
        searched = without_axes("tune.search", tune.get("search") or {RATE: None} | ({HEAD: None} if head else {}))
        free = (RATE, HEAD) if self.rule == LOWEST else (RATE,) if self.sampler == CLIMB else ()
        self.space = {str(name): _values(name, values, self.sampler, free) for name, values in searched.items()}
        self.names = {method: self._names(method) for method in self.small.methods}
        known = {option for names in self.names.values() for option in names.values()}
        if unknown := [option for option in self.space if option not in known]:
            options = [RATE, *known, *(name for method in self.names for name in self._options(method))]
            raise UserError(f"tune.search has {unknown[0]!r}, which no method has.{near(unknown[0], options)}")
        self._grids: dict[str, tuple[list[list[Any]], Point]] = {}
        self._cells: dict[tuple[str, Values, int], list[Cell]] = {}
        self._studies: dict[str, Study] = {}

    def _trees(self, method: str) -> list[Tree]:
        """Return the config of a method with each of its models."""
        if method not in self._configs:
            models = [facts for label, facts in self.small.models.items() if method in self.small.methods_of(label)]
            with errors_in(f"methods.{method}"):
                arguments = self.small.methods[method], self.small.options, None
                self._configs[method] = [cell_config(facts, *arguments, untrained=False) for facts in models]
        return self._configs[method]

    def _tasks(self, method: str) -> list[type[Objective]]:
        return list(map(kind_of, self._trees(method)))

    def _adapter(self, method: str) -> str:
        return str(flatten(self._trees(method)[0])["model.adapter"]).rpartition(".")[2]

    def _options(self, method: str) -> list[str]:
        kind = getattr(methods, self._adapter(method), None)
        return list(inspect.signature(kind).parameters) if kind else []

    def _takes(self, method: str, option: str) -> bool:
        """Return True if the tasks of all models of a method take an option."""
        return all(option in inspect.signature(kind).parameters for kind in self._tasks(method))

    def _head(self, method: str) -> bool | None:
        """Return True if a head with its own rate trains alongside an adapter, False if alone; None without one."""
        heads = [kind.trained_head for kind in self._tasks(method)]
        updates = getattr(getattr(methods, self._adapter(method), None), "updates", True)
        return bool(updates) if all(heads) and self._takes(method, HEAD) else None

    def _names(self, method: str) -> dict[str, str]:
        """Return the options to search of a method: not all have an alpha, and a linear probe has a head's rate."""
        task = self._trees(method)[0]["model"]["class_path"].rpartition(".")[2]
        alone = self.rule == LOWEST and self._head(method) is False  # on texts, too
        names = {HEAD if alone else classes.rate_name(self._adapter(method), task): RATE} if RATE in self.space else {}
        names |= {option: option for option in RATES[1:] if option in self.space and self._takes(method, option)}
        options = self._options(method)
        return names | {option: option for option in self.space if option in options or "." in option}

    def restrict(self, group: str, labels: Sequence[str]) -> None:
        """Keep some models, datasets or methods, and the methods that a model is left for."""
        kept = {label: facts for label, facts in getattr(self.small, group).items() if label in labels}
        changed: dict[str, Any] = {group: kept}
        self.small = replace(self.small, **changed)
        left = {method for model in self.small.models for method in self.small.methods_of(model)}
        self._configs = {}
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

    def _grid(self, method: str) -> tuple[list[list[Any]], Point]:
        """Return the values of each option of a method, and the places of its own rates in those that climb."""
        if method not in self._grids:
            grids: list[list[Any]] = []
            start: list[int] = []
            for name, option in self.names[method].items():
                grid = self.space[option]
                if self.sampler == CLIMB and name in RATES and (self.rule == LOWEST or not grids):
                    tree = self._trees(method)[0]
                    rate = tree["model"].get("init_args", {}).get(name)
                    own = float(getattr(task_of(tree), name) if rate is None else rate)  # the config's, or the default
                    grid = [own * 2.0**power for power in range(-10, 11)] if grid is None else grid
                    start.append(min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / own))))
                grids.append(grid)
            self._grids[method] = grids, tuple(start)
        return self._grids[method]

    def _climbs(self) -> dict[str, list[Climb]]:
        """Return the climbs of each method by the rule ``lowest``, one with each choice of the others."""
        climbs: dict[str, list[Climb]] = {}
        for method in self.names if self.rule == LOWEST else ():
            grids, start = self._grid(method)
            first, every = (partial(self.score, method, seeds=seeds) for seeds in (self.seeds[:1], self.seeds))
            others = product(*grids[len(start) :])
            climbs[method] = [Climb(grids[: len(start)], rest, start, first, every) for rest in others]
        if climbs:
            self.trials = advance_together(list(chain(*climbs.values())), self.description.tune.get("trials"))
        return climbs

    def _winners(self) -> dict[str, Climb]:
        """Return the climb of each method with the best candidate; without the rule ``lowest`` there is none."""
        winners = {}
        for method, climbs in self._climbs().items():
            tops = {climb.values(climb.best): climb for climb in climbs if climb.best is not None}
            for values in self.best(method, [*tops], self.seeds)[:1]:
                winners[method] = tops[values]
        return winners

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
        """Return the candidates to try with the first seed, as far as is known by now, by the rule ``best``."""
        if self.sampler == TPE:
            return list(dict.fromkeys(self.study(method).candidates())) if self._begun() else [self._at_hand(method)]
        grids, start = self._grid(method)
        if not start:
            return list(product(*grids))
        rates, *others = grids
        tried: list[Values] = []
        for rest in product(*others):
            line = [(rate, *rest) for rate in rates]
            tried += climbed(line, start[0] - 1, start[0] + 1, partial(self.score, method, seeds=self.seeds[:1]))[0]
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
        for method, tried in self.tried().items():
            for values, seed in ((values, seed) for values, seeds in tried.items() for seed in seeds):
                cells += [cell for cell in self.cells(method, values, seed) if not self.dropped(cell)]
        return cells

    def tried(self) -> dict[str, dict[Values, list[int]]]:
        """Return the seeds of every candidate of each method that is known by now, in rising order of the rates."""
        tried = {method: self._rounds(method) for method in self.names} if self.rule == BEST else {}
        for method, climbs in self._climbs().items():
            tried[method] = {climb.values(point): self.seeds[:1] for climb in climbs for point in climb.order}
            tried[method] |= {climb.values(point): self.seeds for climb in climbs for point in climb.finalists}
        return {
            method: dict(sorted(runs.items(), key=lambda pair: pair[0][: len(self._grid(method)[1])]))
            for method, runs in tried.items()
        }

    def _rounds(self, method: str) -> dict[Values, list[int]]:
        """Return the candidates of a method that are known by now, each with its seeds, by the rule ``best``."""
        first = self.seeds[:1]
        candidates = self.candidates(method)
        tried = dict.fromkeys(candidates, first)
        over = all(self.score(method, values, first) is not None for values in candidates)
        if not over or (self.sampler == TPE and not (self._begun() and self.study(method).full())):
            return tried
        finalists = self.best(method, candidates, first)[: FINALISTS[BEST]]
        tried |= dict.fromkeys(finalists, self.seeds)
        over = all(self.score(method, values, self.seeds) is not None for values in finalists)
        best = self.best(method, finalists, self.seeds)
        if not over or not best or not self._grid(method)[1]:
            return tried
        line = [(rate, *best[0][1:]) for rate in self._grid(method)[0][0]]
        begun = [index for index, values in enumerate(line) if values in candidates]

        def score(values: Values) -> float | None:
            lost = values in candidates and values not in finalists
            return -math.inf if lost else self.score(method, values, self.seeds)

        # a winner without a neighbour on one side gets one there, and so on
        part, _ = climbed(line, begun[0], begun[-1], score)
        return tried | {values: self.seeds for values in part if values not in candidates}

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
        """Return the candidate that Optuna's first trial is: the method's own values if they are in the space."""
        flat = {name.removeprefix("model.adapter."): value for name, value in flatten(self._trees(method)[0]).items()}
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

    def figures(self, method: str, values: Values, seeds: Sequence[int]) -> list[float] | None:
        """Return the metric of each run of a candidate, or minus the loss; None while one is open, [] if one failed."""
        cells = [cell for seed in seeds for cell in self.cells(method, values, seed)]
        states = {self.folder.state(cell) for cell in cells}
        if OPEN in states and FAILED not in states:
            return None
        metrics = [self.folder.results(cell).get(self.monitor) for cell in cells]
        numbers = [self.sign * float(metric) for metric in metrics if isinstance(metric, int | float)]
        return numbers if len(numbers) == len(cells) and FAILED not in states else []

    def score(self, method: str, values: Values, seeds: Sequence[int]) -> float | None:
        """Return the mean of the metrics of a candidate, minus infinity if it failed; None while cells are open."""
        figures = self.figures(method, values, seeds)
        return None if figures is None else fmean(figures) if figures else -math.inf

    def best(self, method: str, candidates: Sequence[Values], seeds: Sequence[int]) -> list[Values]:
        """Return the candidates that have worked, the best first; of equal ones the first."""
        known = {values: self.score(method, values, seeds) for values in candidates}
        scores = {values: score for values, score in known.items() if score is not None and score > -math.inf}
        return sorted(scores, key=lambda values: -scores[values])

    def chosen(self) -> dict[str, Tree]:
        """Return the choice of each method; a method none of whose candidates worked is left out."""
        chosen: dict[str, Values] = {}
        for method, climb in self._winners().items():
            points = climb.worked(climb.finalists, climb.every)
            figures = {point: self.figures(method, climb.values(point), self.seeds) or [] for point in points}
            chosen[method] = climb.values(lowest(figures))
        for method, tried in self.tried().items() if self.rule == BEST else ():
            for values in self.best(method, [*tried], self.seeds)[:1]:
                chosen[method] = values
        return {method: dict(zip(self.names[method], values, strict=True)) for method, values in chosen.items()}

    def report(self) -> Tree:
        """Everything that was tried, JSON-ready: the provenance of the rates."""
        chosen, tried, winners, entries = self.chosen(), self.tried(), self._winners(), {}
        for method in self.names:
            begun = []
            for values, seeds in tried[method].items():
                figures = {str(seed): self.figures(method, values, [seed]) for seed in seeds}
                entry = dict(zip(self.names[method], values, strict=True))
                runs = {seed: [self.sign * each for each in numbers] for seed, numbers in figures.items() if numbers}
                entry[self.monitor] = {seed: fmean(numbers) for seed, numbers in runs.items()}
                if self.rule == LOWEST and runs:  # their spread is a part of the rule
                    entry["runs"] = runs
                if [] in figures.values():
                    cells = [cell for seed in seeds for cell in self.cells(method, values, seed)]
                    reasons = (self.folder.failure(cell).get("reason") for cell in cells)
                    entry["failed"] = next(filter(None, reasons), f"{self.monitor} is not a finite number")
                if any(numbers is not None for numbers in figures.values()):
                    begun.append(entry)
            facts = self.description.methods[method]
            inside = {"interior": method in winners and winners[method].interior()} if self.rule == LOWEST else {}
            entries[method] = {"method": facts, "chosen": chosen.get(method), **inside, "tried": begun}
        return {
            "finished": self.finished(),
            "split": "val",
            "monitor": self.monitor,
            "measure": vars(self.measure),
            "seeds": self.seeds,
            "finalists": FINALISTS[self.rule],
            "sampler": self.sampler,
            **({"rule": self.rule} if self.sampler == CLIMB else {}),
            **({"trials": self.trials} if self.sampler == TPE or self.rule == LOWEST else {}),
            **({"pruner": self.pruner} if self.sampler == TPE else {}),
            "models": {model: self.description.models[model] for model in self.small.models},
            "datasets": list(self.small.datasets),
            "budgets": self.small.budgets,
            "set": self.description.tune.get("set", {}),
            "methods": entries,
        }

    def remarks(self) -> list[str]:
        """Return remarks on best rates at the edge of what was tried, on equal rates, and on heads."""
        edges, flat = [], []
        tried, winners = self.tried(), self._winners()
        for method, chosen in self.chosen().items():
            if climb := winners.get(method):
                best = climb.values(climb.best or ())[: len(climb.grids)]
                edge = not climb.interior()
            else:
                best = tuple(value for name, value in chosen.items() if name in RATES)[:1]
                rates = {values[:1] for values in tried[method]}
                edge = bool(best) and len(rates) > 1 and best in (min(rates), max(rates))
            if edge:
                edges.append(f"{method} ({' and '.join(f'{each:g}' for each in best)})")
            worked = self.best(method, [*tried[method]], self.seeds[:1])
            if len(worked) > 1 and len({self.score(method, values, self.seeds[:1]) for values in worked}) == 1:
                flat.append(method)
        heads = [method for method in self.names if HEAD not in self.names[method] and self._head(method)]
        beyond = f"Best at the edge of what was tried, so a better rate may lie beyond it: {', '.join(edges)}"
        equal = f"All candidates are equally good, so none can be selected: {', '.join(flat)}. Train for more steps."
        left = f"The heads of {', '.join(heads)} learn at a rate that was not searched, so this compares heads, too."
        return [beyond] * bool(edges) + [equal] * bool(flat) + [left] * bool(heads and len(self.names) > 1)

    def tuned(self) -> SweepConfig:
        """Return the description with the best candidates in it."""
        chosen, given = self.chosen(), self.description.methods
        return replace(
            self.description, methods={label: with_values(given[label], chosen.get(label, {})) for label in given}
        )


def _values(option: str, values: Any, sampler: str, free: Sequence[str]) -> Any:
    """Return the values of an option, checked: a list without doubles, in rising order if it has numbers."""
    where = f"tune.search.{option}"
    numbers = [value for value in (values.values() if isinstance(values, dict) else values or []) if is_number(value)]
    match values:
        case None if option in free:
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
