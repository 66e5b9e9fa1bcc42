"""Reads the runs of a sweep into one table, whatever state they are in.

Curves of training loss and validation metric are in few numbers that fit into ``cells.csv``.
"""

import csv
import math
from collections.abc import Callable, Collection, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from pandas import DataFrame, isna, read_csv

from randlora_pl.lab.paper import paper_rates
from randlora_pl.lab.report.cells import (
    FAILED,
    FILE,
    FINISHED,
    LABELS,
    METRIC,
    NOT_RUN,
    RIGHT,
    SCORE,
    TEST,
    ReportPlan,
    Sweep,
    budget_order,
    read_baselines,
    read_plan,
)
from randlora_pl.run.options.classes import classes, own_task, rate_name
from randlora_pl.run.run_folder import holder
from randlora_pl.sweep import HEAD, RATES, ZERO_SHOT, chosen_for, is_zero_shot, rule_of
from randlora_pl.sweep.folder import FIRST_SECONDS
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import read_mapping

TRAINED, VALIDATED = "curve/train_loss", "curve/val_score"
"""Columns of the runs: means of its training loss over equal parts of its steps; pairs ``step:metric``."""
_LOSS, _SCORES = "train/loss", ("val/score", "val/acc")
_PARTS = 16
"""Largest number of parts of a run's steps, and of its validations."""
_STEPS = 5
"""Fewest steps of a part: the loss of one batch is noise."""


def read_curves(cell: Path) -> dict[str, str]:
    """Return the curves of a run from its logs; what the logs do not have, or is damaged in them, is left out.

    A run that was stopped and resumed has the log of each part in a folder of its own: ``csv``, ``csv_2`` and so on.
    """
    columns: dict[str, dict[int, float]] = {name: {} for name in (_LOSS, *_SCORES)}
    try:
        for log in sorted(cell.glob("csv*/metrics.csv"), key=lambda path: (len(path.parent.name), path)):
            with log.open(encoding="utf-8", newline="") as stream:
                for line in csv.DictReader(stream):
                    step = _number(line.get("step"))
                    for name, values in columns.items():
                        value = _number(line.get(name))
                        if step is not None and step >= 0 and value is not None:
                            values[int(step)] = value
    except (OSError, ValueError, csv.Error):
        return {}
    scores = next((values for name in _SCORES if (values := columns[name])), {})
    points = sorted(scores.items())
    every = max(1, -(-len(points) // _PARTS))
    points = points[::-1][::every][::-1] if len(points) > 1 else []  # the last one among them
    facts = {
        TRAINED: " ".join(f"{mean:.4g}" for mean in _means(columns[_LOSS])),
        VALIDATED: " ".join(f"{step}:{value:.4g}" for step, value in points),
    }
    return {name: text for name, text in facts.items() if text}


def losses(text: object) -> list[float]:
    """Return the means of the training loss over equal parts of a run, as `TRAINED` has them; empty if it has none."""
    numbers = [_number(part) for part in str(text).split()]
    return [value for value in numbers if value is not None]


def scores(text: object) -> dict[float, float]:
    """Return the validation metric in percent by step, of `VALIDATED`; empty if the run did not validate on the way."""
    pairs = [part.partition(":") for part in str(text).split()]
    by_step = {_number(step): _number(value) for step, _, value in pairs}
    return {step: 100 * value for step, value in by_step.items() if step is not None and value is not None}


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _means(values: dict[int, float]) -> list[float]:
    """Return means over equal parts of the steps, as many as have at least `_STEPS` steps and a value each."""
    total = max(values, default=0)
    for count in range(min(_PARTS, len(values), max(1, total // _STEPS)), 0, -1):
        parts = [
            [value for step, value in values.items() if first < step * count <= last]
            for first, last in pairwise(range(0, total * (count + 1), max(total, 1)))
        ]
        if parts and all(parts):
            return [fmean(part) for part in parts]
    return []


PAPER, VALIDATION, TYPED, DEFAULT = "paper", "validation", "typed", "default"
"""How a rate was chosen. The first two are rules; the others are not tuned."""
_TEXTS = (
    *("model", "family", "dataset", "budget", "method", "state", "reason", "cell", "adapter", "task", "device"),
    *("rate_chosen_by", "rate_rule", "version", "git_commit", "machine", "version/python", "version/torch"),
    *("base/library", METRIC, RIGHT, TRAINED, VALIDATED),
)
_NUMBERS = (
    *("seed", "accuracy", "zeroshot_accuracy", "learning_rate", "head_learning_rate", "trainable_parameters"),
    *("total_parameters", "steps", "fit_seconds", "images_per_second", "samples_per_second", "peak_memory_bytes"),
)
"""Columns that are there even if no run has them."""

Row = dict[str, Any]


def read_cells(folder: Path) -> DataFrame:
    """Read the runs of a sweep, or of a report with its ``cells.csv``, as a table with a row for each.

    ============================================  ====================================================================
    ``model``, ``dataset``, ``budget``,           Labels; ``zero-shot`` is the method, and the budget, of the
    ``method``, ``seed``, ``family``              pretrained model.
    ``state``, ``reason``, ``status``             ``finished``, ``failed``, ``running``, ``unfinished``, ``damaged`` or
                                                  ``not run``; why; and both in one text.
    ``cell``                                      Name of its folder in ``cells``.
    ``accuracy``, ``zeroshot_accuracy``           Of the run and of the pretrained model, in percent.
    ``learning_rate``, ``rate_chosen_by``,        Rate of a trained run; ``paper``, ``validation``, ``typed`` or
    ``rate_rule``                                 ``default``; equal texts for rates that were chosen in one way.
    ``tied``                                      True if a head learned at its adapter's rate without a search.
    ``adapter``                                   Class of the adapter.
    all others                                    Numbers of ``results.json``, the last one of those over steps.
    ============================================  ====================================================================

    Raises:
        UserError: The folder holds no sweep, or the sweep has no finished cell.
    """
    return read_sweep(folder).cells


def read_sweep(folder: Path, names: Collection[str] | None = None) -> Sweep:
    """Read a sweep with its plan, and of its cells those with these names (default: all).

    Raises:
        UserError: The folder holds no sweep, or the sweep has no finished cell.
    """
    cell_folders = sorted((folder / "cells").glob("*/")) if (folder / "cells").is_dir() else []
    cell_folders = [cell for cell in cell_folders if names is None or cell.name in names]
    if (folder / "tune.yaml").is_file() and not (folder / FILE).is_file():
        raise UserError(f"{folder} is a search of learning rates: what it found is in {folder}/tuning.md")
    table = folder / "cells.csv"
    if not cell_folders and not (folder / FILE).is_file() and not table.is_file():
        if not folder.is_dir():
            where = "A sweep is a folder such as runs/sweeps/NAME; make one: randlora-pl sweep CONFIG"
            raise UserError(f"{folder} does not exist. {where}")
        inside = sorted(path.parent for path in folder.glob(f"*/{FILE}"))
        hint = f"Did you mean {inside[0]}?" if inside else "Make one: randlora-pl sweep CONFIG"
        raise UserError(f"{folder} is not a sweep: it has neither {FILE} nor cells/. {hint}")
    warnings: list[str] = []
    try:
        plan = read_plan(folder)
    except UserError as error:
        warnings.append(str(error))
        plan = ReportPlan.unknown()
    if table.is_file() and not cell_folders:
        rows = _read_table(table)
        for row in rows:
            row |= {name: value / 100 for name, value in row.items() if name.startswith(TEST)}
            rate = {rate_name(str(row.get("adapter")), row.get("task")): row.get("learning_rate")}
            row |= _rate(plan, row, rate, rate if row.get("rate_chosen_by") == TYPED else {})
    else:
        rows = [cell_row for cell in cell_folders if (cell_row := _of_folder(folder, cell, plan, warnings.append))]
    there = _without_twins(folder, rows, warnings)
    rows, cells_there = list(there.values()), {place[:-1] for place in there}
    missing = []  # of what was planned, not of labels that only the cells know
    for key in plan.cells():  # none without a plan; nothing in an untrained model is random, so one seed is enough
        seeds: list[int | None] = [*plan.seeds] if key.budget != ZERO_SHOT else [None] * (key not in cells_there)
        missing += [key._asdict() | {"seed": s, "state": NOT_RUN} for s in seeds if (*key, s) not in there]
    for row in rows:  # labels that only the cells have come after the planned ones
        for name, labels in (("model", plan.models), ("dataset", plan.datasets), ("method", plan.methods)):
            labels.setdefault(row[name], {})
    untrained = [ZERO_SHOT] * any(map(is_zero_shot, plan.methods))
    budgets = dict.fromkeys((*plan.budgets, *(row["budget"] for row in rows), *untrained))
    plan.budgets[:] = sorted(budgets, key=budget_order)
    plan.seeds[:] = plan.seeds or sorted({row["seed"] for row in rows if row.get("seed") is not None})
    if not any(row["state"] == FINISHED for row in rows):
        count = f"{len(cell_folders)} cells are there, none of them" if cell_folders else "none of its cells"
        tail = next((f" First failure: {_status(row)}" for row in rows if row["state"] == FAILED), "")
        raise UserError(f"{folder} has nothing to report: {count} is finished.{tail}")
    cells = DataFrame([row | {"status": _status(row)} for row in [*rows, *missing]])
    cells = cells.reindex(columns=list(dict.fromkeys((*LABELS, *_TEXTS, *_NUMBERS, *cells.columns))))
    texts = cells[["family", "reason", "cell", "device"]].astype(object).fillna("")
    cells = cells.assign(seed=cells["seed"].astype("Int64"), **texts)
    return Sweep(folder, plan, cells, warnings, read_baselines(folder, warnings.append))


def _status(row: Row) -> str:
    return f"{row['state']}: {row['reason']}" if row.get("reason") else str(row["state"])


def _read_table(file: Path) -> list[Row]:
    """Return the rows of a file that `cells_csv` wrote, without their empty cells; numbers have its six digits.

    Raises:
        UserError: It cannot be read, or is another table.
    """
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            texts = dict.fromkeys(_TEXTS, str)
            table = read_csv(stream, dtype=texts, keep_default_na=False, na_values=[""]).convert_dtypes()
        missing = {*LABELS, "seed", "state"} - {*table.columns}
        if missing:
            raise KeyError(*sorted(missing))
        return [
            {str(name): value for name, value in row.items() if not isna(value)} for row in table.to_dict("records")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a table of cells ({type(error).__name__}: {error}).") from error


def _of_folder(folder: Path, cell: Path, plan: ReportPlan, warn: Callable[[str], None]) -> Row | None:
    try:
        labels = read_mapping(cell / "cell.json")
        place: Row = {name: str(labels[name]) for name in LABELS} | {"seed": int(labels["seed"])}
    except FileNotFoundError:
        warn(f"cells/{cell.name} has no cell.json; it is left out")
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warn(f"cells/{cell.name}/cell.json is cut off or damaged ({type(error).__name__}: {error}); it is left out")
        return None
    state, reason, metrics = _state(folder, cell, warn)
    accuracy = zeroshot = None
    if state == FINISHED:
        if "from/form" in metrics:  # the log has the second stage alone; a time of which either is unknown has no use
            seconds = [metrics.pop(name, None) for name in ("fit_seconds", FIRST_SECONDS)]
            if all(type(value) in (int, float) for value in seconds):
                metrics["fit_seconds"] = sum(seconds)
        else:
            metrics |= read_curves(cell)
        if (metric := metrics.get("metric")) not in (None, SCORE):
            raise UserError(
                f"cells/{cell.name} has the metric {metric} of {metrics.get('task')}, and a report compares accuracies "
                "and correlations. Use randlora-pl compare RUN RUN."
            )
        metrics |= {METRIC: SCORE} if metric == SCORE else {}
        # what counts where that is not the accuracy is a correlation, or a share that may be below 0
        scored, least = f"test/{SCORE}" in metrics, -math.inf if metric else -1
        accuracy = _percent(metrics, f"test/{SCORE}", least) if scored else _percent(metrics, "test/acc")
        zeroshot = _percent(metrics, "zeroshot/acc")
        if place["budget"] == ZERO_SHOT:
            accuracy = zeroshot if accuracy is None else accuracy
        if accuracy is None:
            reason = f"results.json has no accuracy from 0 to 1 (test/acc is {metrics.get('test/acc')})"
            state = "damaged"
            warn(f"cells/{cell.name}: {reason}")
    # the finite numbers, the last one of a list over steps, and the known texts
    last = {name: value[-1] if isinstance(value, list) and value else value for name, value in metrics.items()}
    last["adapter"] = last.pop("method", None)  # the label of the method has its name
    row = {name: value for name, value in last.items()
           if (isinstance(value, str) if name in _TEXTS else _is_number(value))}  # fmt: skip
    row |= place | {"state": state, "reason": reason, "cell": cell.name}
    row |= {"family": str(labels.get("family") or ""), "accuracy": accuracy, "zeroshot_accuracy": zeroshot}
    config = labels["config"] if isinstance(labels.get("config"), dict) else {}
    typed = {name: rate for name in RATES if (rate := config.get(f"model.{name}")) is not None}
    return row | _rate(plan, row, row, typed)


def _state(folder: Path, cell: Path, warn: Callable[[str], None]) -> tuple[str, str, Row]:
    """Return the state of a cell, its reason, and the metrics of its run as far as it went."""

    def read(name: str) -> Row | None:
        try:
            return read_mapping(cell / name)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError) as error:
            warn(f"cells/{cell.name}/{name} is cut off or damaged ({error})")
            return None

    metrics = read("results.json")
    if metrics is None:
        return "damaged", "results.json is cut off or damaged", {}
    if metrics.get("finished") is True:
        return FINISHED, "", metrics
    if holder(folder / "locks" / f"{cell.name}.lock"):
        return "running", "", metrics
    if not (cell / "failed.json").exists():
        return "unfinished", "", metrics
    failed = read("failed.json")
    if failed is None:
        return FAILED, "failed.json is cut off or damaged", metrics
    return FAILED, " ".join(str(failed.get("reason") or "no reason given").split()), metrics


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _percent(metrics: Row, name: str, least: float = 0) -> float | None:
    value: Any = metrics.get(name)
    return 100 * float(value) if _is_number(value) and least <= value <= 1 else None


def _rate(plan: ReportPlan, row: Row, rates: Mapping[str, Any], typed: Mapping[str, Any]) -> Row:
    """Return the learning rate of a trained run, how it was chosen, and by what rule; no rule for one not tuned."""
    if row.get("accuracy") is None or is_zero_shot(row["method"]):
        return {"learning_rate": None, "rate_chosen_by": None}
    method, model = plan.methods.get(row["method"], {}), plan.models.get(row["model"], {})
    adapter, task = str(row.get("adapter") or ""), str(row.get("task") or "VisionLanguageTask")
    chosen = chosen_for(plan.tuned, model, row["method"], method)
    only_head = HEAD in (chosen or method) and "learning_rate" not in (chosen or method)
    name = HEAD if only_head else rate_name(adapter, task)
    by_hand = typed.get(name, method.get(name))
    value = by_hand if isinstance(by_hand, int | float) else rates.get(name) or None
    head = float(row.get(HEAD) or chosen.get(HEAD, 0.0))
    beside = only_head or math.isclose(head, chosen.get(HEAD, head), rel_tol=1e-5)  # of cells.csv
    paper = paper_rates(adapter, task) if plan.tables or plan.figure else ()
    if name in chosen and value is not None and math.isclose(value, chosen[name]) and beside:
        how, rule = VALIDATION, rule_of(plan.tuned)
    elif paper and (value is None or any(math.isclose(value, rate) for rate in paper)):
        how = rule = PAPER
    else:
        how, rule = DEFAULT if by_hand is None else TYPED, ""
    tied = HEAD not in chosen and value is not None and _tied(adapter, task, value, row.get(HEAD))
    return {"learning_rate": value, "rate_chosen_by": how, "rate_rule": rule, "tied": tied}


def _tied(adapter: str, task: str, rate: float, head: float | None) -> bool:
    """Return True if a head alongside an adapter learned at its rate; of older runs without the head's, by the task."""
    if not getattr(classes("model.adapter").get(adapter), "updates", True):
        return False  # the head trains alone
    return bool(getattr(own_task(task), "tied_head", False)) if head is None else math.isclose(head, rate, rel_tol=1e-5)


def _without_twins(folder: Path, rows: list[Row], warnings: list[str]) -> dict[tuple[object, ...], Row]:
    """Return one row for each cell and seed, by both: of twins the finished one, and of these the newest."""

    def time(row: Row) -> float:
        file = folder / "cells" / row.get("cell", "") / "results.json"
        return file.stat().st_mtime if file.is_file() else 0.0

    by_run: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        by_run.setdefault((*(row[name] for name in LABELS), row.get("seed")), []).append(row)
    for (*labels, seed), twins in by_run.items():
        if len(twins) > 1:
            twins.sort(key=lambda row: (row["state"] == FINISHED, time(row)), reverse=True)
            names, cell = " and ".join(sorted(row["cell"] for row in twins)), " ".join(map(str, labels))
            which = f"with {len(twins)} configs: {twins[0]['cell']} is used"
            warnings.append(f"{names} are the same cell ({cell}, seed {seed}) {which}")
    return {place: twins[0] for place, twins in by_run.items()}
