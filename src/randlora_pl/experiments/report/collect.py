"""Reads the cells of a sweep, whatever state they are in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.experiments.report.plan import FILE, ZERO_SHOT, Key, Plan, budget_order, read_plan
from randlora_pl.experiments.report.runs import Run
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.lease import holder

FINISHED, FAILED, RUNNING, UNFINISHED, DAMAGED, NOT_RUN = (
    *("finished", "failed", "running", "unfinished", "damaged", "not run"),
)
"""States of a run. Only the accuracy of a finished one is used."""

SCORE = "test/score"
"""What counts where that is not the accuracy: a correlation, from -1 to 1."""
RATES = ("learning_rate", "head_learning_rate")
_LABELS = ("model", "dataset", "budget", "method")


@dataclass
class Sweep:
    """All runs of a sweep.

    Attributes:
        folder: The sweep.
        plan: Plan of the sweep; its lists also hold labels that only the cells know.
        runs: Every planned or found run.
        warnings: Unreadable files, one line each.
    """

    folder: Path
    plan: Plan
    runs: list[Run]
    warnings: list[str]

    @property
    def finished(self) -> list[Run]:
        """Return the runs with an accuracy."""
        return [run for run in self.runs if run.accuracy is not None]

    def place(self, run: Run) -> Path:
        """Return the run folder of a cell that was begun: config, results, adapter, log."""
        return self.folder / "cells" / run.cell


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep.

    Args:
        folder: The sweep's folder.

    Raises:
        UserError: The folder holds no sweep, or the sweep has no finished cell.
    """
    places = sorted((folder / "cells").glob("*/")) if (folder / "cells").is_dir() else []
    if (folder / "tune.yaml").is_file() and not (folder / FILE).is_file():
        raise UserError(f"{folder} is a search of learning rates: what it found is in {folder}/tuning.md")
    from randlora_pl.experiments.report.from_csv import CELLS, read_runs  # which makes runs as this module does

    table = folder / CELLS
    if not places and not (folder / FILE).is_file() and not table.is_file():
        raise UserError(_no_sweep(folder))
    warnings: list[str] = []
    try:
        plan = read_plan(folder)
    except UserError as error:
        warnings.append(str(error))
        plan = Plan(known=False)
    found: dict[tuple[Key, int | None], Run] = {}
    kept_runs = read_runs(table) if not places and table.is_file() else []
    for run in [*kept_runs, *(_read_cell(folder, place, warnings.append) for place in places)]:
        if run is None:
            continue
        older = found.get((run.key, run.seed))
        if older is not None:
            kept = max(older, run, key=lambda one: (one.state == FINISHED, _time(folder, one)))
            warnings.append(
                f"{older.cell} and {run.cell} are the same cell ({' '.join(run.key)}, seed {run.seed}) with two "
                f"configs: {kept.cell} is used"
            )
            run = kept
        found[run.key, run.seed] = run
    missing = _missing(plan, found)  # of what was planned, not of labels that only the cells know
    _add_labels(plan, list(found.values()))
    sweep = Sweep(folder, plan, [*found.values(), *missing], warnings)
    if not sweep.finished:
        count = f"{len(places)} cells are there, none of them" if places else "none of its cells"
        tail = next((f" First failure: {run.status}" for run in sweep.runs if run.state == FAILED), "")
        raise UserError(f"{folder} has nothing to report: {count} is finished.{tail}")
    order = {part: {label: n for n, label in enumerate(getattr(plan, part + "s"))} for part in _LABELS}
    sweep.runs.sort(
        key=lambda run: (
            *(order[p][getattr(run.key, p)] for p in ("model", "budget", "method", "dataset")),
            run.seed or 0,
        )
    )
    return sweep


def _no_sweep(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"{folder} does not exist. A sweep is a folder such as runs/sweeps/NAME; make one: randlora-pl sweep CONFIG"
        )
    inside = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    hint = f" Did you mean {inside[0]}?" if inside else " Make one: randlora-pl sweep CONFIG"
    return f"{folder} is not a sweep: it has neither {FILE} nor cells/.{hint}"


def _read_cell(folder: Path, place: Path, warn: Callable[[str], None]) -> Run | None:
    try:
        labels = _read_json(place / "cell.json")
        key = Key(*(str(labels[name]) for name in _LABELS))
        seed = int(labels["seed"])
    except FileNotFoundError:
        warn(f"cells/{place.name} has no cell.json; it is left out")
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"cells/{place.name}/cell.json is cut off or damaged ({type(error).__name__}: {error}); it is left out")
        return None
    family = str(labels.get("family") or "")
    state, reason, figures = _state(folder, place, warn)
    accuracy = zeroshot = None
    if state == FINISHED:
        accuracy = _percent(figures, SCORE, least=-1) if SCORE in figures else _percent(figures, "test/acc")
        zeroshot = _percent(figures, "zeroshot/acc")
        if key.budget == ZERO_SHOT:
            accuracy = zeroshot if accuracy is None else accuracy
        if accuracy is None:
            state, reason = DAMAGED, f"results.json has no accuracy from 0 to 1 (test/acc is {figures.get('test/acc')})"
            warn(f"cells/{place.name}: {reason}")
    config = labels.get("config")
    rates = {name: config.get(f"model.{name}") for name in RATES} if isinstance(config, dict) else {}
    typed = {name: value for name, value in rates.items() if value is not None}
    return Run(key, seed, state, reason, place.name, family, accuracy, zeroshot, figures, typed)


def _state(folder: Path, place: Path, warn: Callable[[str], None]) -> tuple[str, str, dict[str, Any]]:
    figures: dict[str, Any] = {}
    try:
        figures = _read_json(place / "results.json")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError) as error:
        warn(f"cells/{place.name}/results.json is cut off or damaged ({error})")
        return DAMAGED, "results.json is cut off or damaged", {}
    if figures.get("finished") is True:
        return FINISHED, "", figures
    if holder(folder / "locks" / f"{place.name}.lock"):
        return RUNNING, "", figures
    try:
        failed = _read_json(place / "failed.json")
        return FAILED, " ".join(str(failed.get("reason") or "no reason given").split()), figures
    except FileNotFoundError:
        return UNFINISHED, "", figures
    except (OSError, ValueError, TypeError) as error:
        warn(f"cells/{place.name}/failed.json is cut off or damaged ({error})")
        return FAILED, "failed.json is cut off or damaged", figures


def _read_json(file: Path) -> dict[str, Any]:
    content = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no mapping")
    return content


def _percent(figures: dict[str, Any], name: str, least: float = 0) -> float | None:
    value = figures.get(name)
    good = (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= 1
    )
    return 100 * float(value) if good and value is not None else None


def _time(folder: Path, run: Run) -> float:
    file = folder / "cells" / run.cell / "results.json"
    return file.stat().st_mtime if file.is_file() else 0.0


def _add_labels(plan: Plan, runs: list[Run]) -> None:
    """Append labels that only the cells know to the planned ones, with budgets in their order."""
    for run in runs:
        for name in _LABELS:
            known, label = getattr(plan, name + "s"), getattr(run.key, name)
            if label not in known:
                known.append(label)
        if run.family:
            plan.families.setdefault(run.key.model, run.family)
    if any(plan.untrained(method) for method in plan.methods) and ZERO_SHOT not in plan.budgets:
        plan.budgets.append(ZERO_SHOT)
    plan.budgets.sort(key=budget_order)
    if not plan.known:
        plan.seeds = sorted({run.seed for run in runs if run.seed is not None})


def _missing(plan: Plan, found: dict[tuple[Key, int | None], Run]) -> list[Run]:
    """Planned runs that no folder is there for. One seed of an untrained model is enough: nothing in it is random."""
    if not plan.known:
        return []
    there = {key for key, _ in found}
    missing = []
    for key in plan.cells():
        if key.budget == ZERO_SHOT:
            missing += [] if key in there else [Run(key, None, NOT_RUN)]
        else:
            missing += [Run(key, seed, NOT_RUN) for seed in plan.seeds if (key, seed) not in found]
    return missing
