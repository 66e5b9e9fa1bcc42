"""Reads the cells of a sweep, whatever state they are in."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from randlora_pl.lab.report.baselines import Baseline, read_baselines
from randlora_pl.lab.report.curves import read_curves
from randlora_pl.lab.report.plan import FILE, Key, ReportPlan, budget_order, read_plan
from randlora_pl.lab.report.runs import CELLS, FinishedRun, read_runs
from randlora_pl.sweep.description import ZERO_SHOT, is_zero_shot
from randlora_pl.sweep.folder import FIRST_SECONDS
from randlora_pl.sweep.provenance import RATES
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.lease import holder

FINISHED, FAILED, RUNNING, UNFINISHED, DAMAGED, NOT_RUN = (
    *("finished", "failed", "running", "unfinished", "damaged", "not run"),
)
"""States of a run. Only the accuracy of a finished one is used."""

SCORE = "test/score"
"""What counts where that is not the accuracy: a correlation, from -1 to 1."""


@dataclass
class Sweep:
    """All runs of a sweep, planned or found.

    Attributes:
        plan: Plan of the sweep; its lists also have labels that only the cells have.
        warnings: Unreadable files, one line each.
        baselines: Results of plain classifiers of pixels or words.
    """

    folder: Path
    plan: ReportPlan
    runs: list[FinishedRun]
    warnings: list[str]
    baselines: list[Baseline] = field(default_factory=list)

    @property
    def finished(self) -> list[FinishedRun]:
        """Return the runs with an accuracy."""
        return [run for run in self.runs if run.accuracy is not None]

    def cell_folder(self, run: FinishedRun) -> Path:
        """Return the run folder of a cell that was begun: config, results, adapter, log."""
        return self.folder / "cells" / run.cell


def read_sweep(folder: Path) -> Sweep:
    """Read a sweep.

    Raises:
        UserError: The folder holds no sweep, or the sweep has no finished cell.
    """
    cell_folders = sorted((folder / "cells").glob("*/")) if (folder / "cells").is_dir() else []
    if (folder / "tune.yaml").is_file() and not (folder / FILE).is_file():
        raise UserError(f"{folder} is a search of learning rates: what it found is in {folder}/tuning.md")
    table = folder / CELLS
    if not cell_folders and not (folder / FILE).is_file() and not table.is_file():
        raise UserError(_no_sweep(folder))
    warnings: list[str] = []
    try:
        plan = read_plan(folder)
    except UserError as error:
        warnings.append(str(error))
        plan = ReportPlan()
    found: dict[tuple[Key, int | None], FinishedRun] = {}
    kept_runs = read_runs(table) if not cell_folders and table.is_file() else []
    for run in [*kept_runs, *(_read_cell(folder, cell_folder, warnings.append) for cell_folder in cell_folders)]:
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
    sweep = Sweep(folder, plan, [*found.values(), *missing], warnings, read_baselines(folder, warnings.append))
    if not sweep.finished:
        count = f"{len(cell_folders)} cells are there, none of them" if cell_folders else "none of its cells"
        tail = next((f" First failure: {run.status}" for run in sweep.runs if run.state == FAILED), "")
        raise UserError(f"{folder} has nothing to report: {count} is finished.{tail}")
    order = {part: {label: n for n, label in enumerate(getattr(plan, part + "s"))} for part in Key._fields}
    parts = ("model", "budget", "method", "dataset")
    sweep.runs.sort(key=lambda run: (*(order[part][getattr(run.key, part)] for part in parts), run.seed or 0))
    return sweep


def _no_sweep(folder: Path) -> str:
    if not folder.is_dir():
        return (
            f"{folder} does not exist. A sweep is a folder such as runs/sweeps/NAME; make one: randlora-pl sweep CONFIG"
        )
    inside = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
    hint = f" Did you mean {inside[0]}?" if inside else " Make one: randlora-pl sweep CONFIG"
    return f"{folder} is not a sweep: it has neither {FILE} nor cells/.{hint}"


def _read_cell(folder: Path, cell_folder: Path, warn: Callable[[str], None]) -> FinishedRun | None:
    try:
        labels = _read_json(cell_folder / "cell.json")
        key = Key(*(str(labels[name]) for name in Key._fields))
        seed = int(labels["seed"])
    except FileNotFoundError:
        warn(f"cells/{cell_folder.name} has no cell.json; it is left out")
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(
            f"cells/{cell_folder.name}/cell.json is cut off or damaged ({type(error).__name__}: {error}); "
            "it is left out"
        )
        return None
    state, reason, metrics = _state(folder, cell_folder, warn)
    accuracy = zeroshot = None
    if state == FINISHED:
        if "from/form" in metrics:  # the log has the second stage alone
            _add_first_stage(metrics)
        else:
            metrics |= read_curves(cell_folder)
        accuracy = _percent(metrics, SCORE, least=-1) if SCORE in metrics else _percent(metrics, "test/acc")
        zeroshot = _percent(metrics, "zeroshot/acc")
        if key.budget == ZERO_SHOT:
            accuracy = zeroshot if accuracy is None else accuracy
        if accuracy is None:
            state, reason = DAMAGED, f"results.json has no accuracy from 0 to 1 (test/acc is {metrics.get('test/acc')})"
            warn(f"cells/{cell_folder.name}: {reason}")
    config = labels["config"] if isinstance(labels.get("config"), dict) else {}
    typed = {name: rate for name in RATES if (rate := config.get(f"model.{name}")) is not None}
    family = str(labels.get("family") or "")
    return FinishedRun(key, seed, state, reason, cell_folder.name, family, accuracy, zeroshot, metrics, typed)


def _state(folder: Path, cell_folder: Path, warn: Callable[[str], None]) -> tuple[str, str, dict[str, Any]]:
    """Return the state of a cell, its reason, and the metrics of its run as far as it went."""

    def read(name: str) -> dict[str, Any] | None:
        try:
            return _read_json(cell_folder / name)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            warn(f"cells/{cell_folder.name}/{name} is cut off or damaged ({error})")
            return None

    metrics = read("results.json")
    if metrics is None:
        return DAMAGED, "results.json is cut off or damaged", {}
    if metrics.get("finished") is True:
        return FINISHED, "", metrics
    if holder(folder / "locks" / f"{cell_folder.name}.lock"):
        return RUNNING, "", metrics
    if not (cell_folder / "failed.json").exists():
        return UNFINISHED, "", metrics
    failed = read("failed.json")
    if failed is None:
        return FAILED, "failed.json is cut off or damaged", metrics
    return FAILED, " ".join(str(failed.get("reason") or "no reason given").split()), metrics


def _read_json(file: Path) -> dict[str, Any]:
    content = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("no mapping")
    return content


def _add_first_stage(metrics: dict[str, Any]) -> None:
    """Add the time of the first stage to the training time, which compares with no other if either is unknown."""
    seconds = [metrics.pop(name, None) for name in ("fit_seconds", FIRST_SECONDS)]
    if all(type(value) in (int, float) for value in seconds):
        metrics["fit_seconds"] = sum(seconds)


def _percent(metrics: dict[str, Any], name: str, least: float = 0) -> float | None:
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return 100 * float(value) if least <= value <= 1 else None


def _time(folder: Path, run: FinishedRun) -> float:
    file = folder / "cells" / run.cell / "results.json"
    return file.stat().st_mtime if file.is_file() else 0.0


def _add_labels(plan: ReportPlan, runs: list[FinishedRun]) -> None:
    """Append labels that only the cells have to the planned ones, with budgets in their order."""
    for run in runs:
        for name in Key._fields:
            known, label = getattr(plan, name + "s"), getattr(run.key, name)
            if label not in known:
                known.append(label)
        if run.family:
            plan.families.setdefault(run.key.model, run.family)
    if any(map(is_zero_shot, plan.methods)) and ZERO_SHOT not in plan.budgets:
        plan.budgets.append(ZERO_SHOT)
    plan.budgets.sort(key=budget_order)
    plan.seeds = plan.seeds or sorted({run.seed for run in runs if run.seed is not None})


def _missing(plan: ReportPlan, found: dict[tuple[Key, int | None], FinishedRun]) -> list[FinishedRun]:
    """Planned runs that no folder is there for. One seed of an untrained model is enough: nothing in it is random."""
    there = {key for key, _ in found}
    missing = []
    for key in plan.cells():  # none without a plan
        if key.budget == ZERO_SHOT:
            missing += [] if key in there else [FinishedRun(key, None, NOT_RUN)]
        else:
            missing += [FinishedRun(key, seed, NOT_RUN) for seed in plan.seeds if (key, seed) not in found]
    return missing
