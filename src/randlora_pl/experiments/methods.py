"""One table of every method on one few-shot data set: mean and standard error over seeds, beside plain baselines."""

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from randlora_pl.callbacks import ZeroShot
from randlora_pl.data import ImageData
from randlora_pl.experiments.choice import best_of
from randlora_pl.experiments.comparison import Comparison
from randlora_pl.experiments.sweep.provenance import FILE
from randlora_pl.tasks import make_trainer
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import write_text
from randlora_pl.utils.run_results import environment
from randlora_pl.utils.text.formatting import duration


@dataclass(frozen=True)
class Cell:
    """One run: method, seed, accuracy as a fraction of 1, trained parameters, seconds, learning rate and its choice."""

    method: str
    seed: int
    accuracy: float
    trainable: int = 0
    seconds: float = 0.0
    rate: float | None = None
    chosen: str = ""


def run_cell(comparison: Comparison, name: str, seed: int, split: str = "test", **changes: Any) -> Cell:
    """Trains one method with one seed and evaluates it once.

    Args:
        comparison: The comparison.
        name: Name of the method in it.
        seed: The seed.
        split: ``test``, or ``val`` for a search that must not see the test images.
        changes: Arguments of the task to change, such as ``learning_rate``.
    """
    task, data = comparison.task(name, seed, **changes), comparison.images(seed)
    trainer = make_trainer(limit_val_batches=0)
    start = time.perf_counter()
    trainer.fit(task, data)
    seconds = time.perf_counter() - start
    trainable = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    rate = getattr(task, comparison.tuned_option(name))
    return Cell(name, seed, _evaluate(task, data, split), trainable, seconds, rate, comparison.rate(name)[1])


def zero_shot(comparison: Comparison, seed: int) -> Iterator[Cell]:
    """The base model before any training; nothing where no method of the comparison starts from its text tower."""
    for name in comparison.methods:
        task = comparison.task(name, seed)
        if task.zero_shot:
            yield Cell("zero-shot", seed, _evaluate(task, comparison.images(seed), "test", [ZeroShot()]))
            return


def _evaluate(task: Any, data: ImageData, split: str, callbacks: Any = None) -> float:
    trainer = make_trainer(callbacks=callbacks)
    found = (trainer.validate if split == "val" else trainer.test)(task, data, verbose=False)
    return float(found[0][f"{split}/acc"])


def baselines(comparison: Comparison, seed: int) -> Iterator[Cell]:
    """Two classifiers of raw pixels on the same images: logistic regression and the nearest neighbour."""
    data = comparison.images(seed)
    data.setup()
    splits = {}
    for split in ("train", "test"):
        samples = data.samples(split)
        images = np.stack([np.asarray(samples.images.load(row)).reshape(-1) for row in samples.rows.tolist()])
        splits[split] = images.astype(np.float64), samples.labels
    logistic = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    for name, model in (("logistic regression", logistic), ("1-nearest neighbour", KNeighborsClassifier(1))):
        model.fit(*splits["train"])
        yield Cell(f"{name} (raw pixels)", seed, float(model.score(*splits["test"])))


def compare(comparison: Comparison, output: Path, say: Any = print) -> Path:
    """Runs every method with every seed and writes ``cells.json``, ``table.md`` and the settings.

    Args:
        comparison: What to compare.
        output: A new folder.
        say: Receives a line for each finished run.

    Returns:
        The folder. ``cells.json`` and the table are brought up to date after every run.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"model": comparison.model, "data": comparison.data, "methods": comparison.methods}
    (output / "comparison.yaml").write_text(yaml.safe_dump(settings | {"seeds": comparison.seeds}, sort_keys=False))
    cells: list[Cell] = []
    for seed in comparison.seeds:
        cells += [*baselines(comparison, seed), *zero_shot(comparison, seed)]
        for name in comparison.methods:
            cells.append(cell := run_cell(comparison, name, seed))
            time = duration(cell.seconds)
            say(f"{name}, seed {seed}: {100 * cell.accuracy:.1f} % in {time}, {cell.trainable:,} trained")
            write_text(output / "cells.json", json.dumps([vars(c) for c in cells], indent=1) + "\n")
            write_text(output / "table.md", table(cells))
    return output


Found = dict[str, dict[float, list[float]]]
"""Accuracies by method and learning rate, one for each seed."""


def tune(comparison: Comparison, output: Path, say: Any = print) -> Found:
    """Validation accuracy of the methods at the learning rates; the test images are not read.

    Every rate is tried with the first of the tuning seeds, the two best also with the others: one run on few
    validation images is too noisy a judge between neighbours.

    Args:
        comparison: With ``learning_rates`` and ``tuning_seeds``.
        output: A new folder. Its `FILE`, the record of the search, is brought up to date after every run.
        say: Receives a line for each finished run.

    Raises:
        UserError: There is nothing to try, or a tuning seed is one of the comparison's.
    """
    check_tuning(comparison)
    found: Found = {}
    for name in comparison.methods:
        option, tried = comparison.tuned_option(name), found.setdefault(name, {})
        rates = sorted(set(comparison.learning_rates))
        for place, seed in enumerate(comparison.tuning_seeds):
            if place == 1:
                rates = best_of({rate: tried[rate][0] for rate in rates}, 2)
            for rate in rates:
                cell = run_cell(comparison, name, seed, "val", **{option: rate})
                tried.setdefault(rate, []).append(cell.accuracy)
                say(f"{name} at {option} {rate:g}, seed {seed}: {100 * cell.accuracy:.1f} % on validation")
                write_text(output / FILE, json.dumps(provenance(comparison, found), indent=1) + "\n")
    write_text(output / FILE, json.dumps(provenance(comparison, found) | {"finished": True}, indent=1) + "\n")
    return found


def provenance(comparison: Comparison, found: Found) -> dict[str, Any]:
    """What was searched, tried and chosen, as a config names it by ``tuned``."""
    methods = {}
    for name, figures in found.items():
        option, seeds = comparison.tuned_option(name), comparison.tuning_seeds
        tried = [{option: rate, "val/acc": dict(zip(map(str, seeds), values, strict=False))}
                 for rate, values in sorted(figures.items())]  # fmt: skip
        chosen = {option: best_rate(figures)}
        methods[name] = {"method": comparison.methods[name], "chosen": chosen, "tried": tried}
    made = {name: value for name, value in environment().items() if name in ("version", "git_commit")}
    searched = {"split": "val", "monitor": "val/acc", "seeds": comparison.tuning_seeds, "finalists": 2}
    searched |= {"learning_rates": comparison.learning_rates, "set": comparison.data}
    return made | {"finished": False} | searched | {"models": {"": comparison.model}, "methods": methods}


def best_rate(figures: dict[float, list[float]]) -> float:
    """The rate with the best mean of those that have most seeds; of equal ones the lowest."""
    runs = max(map(len, figures.values()))
    (rate,) = best_of({rate: statistics.mean(values) for rate, values in figures.items() if len(values) == runs}, 1)
    return float(rate)


def check_tuning(comparison: Comparison) -> None:
    """Whether the rates can be searched.

    Raises:
        UserError: As `tune`.
    """
    if not comparison.learning_rates:
        raise UserError("learning_rates is empty: give the comparison's config the rates to try.")
    if both := set(comparison.tuning_seeds) & set(comparison.seeds):
        raise UserError(f"seeds and tuning_seeds both contain {min(both)}; choose others for one of them.")
    data = comparison.images(comparison.tuning_seeds[0])
    data.setup()
    if isinstance(data.val_dataloader(), list):  # no loader at all
        raise UserError("data.train_split keeps no validation images; tuning needs them.")


def best_rates(comparison: Comparison, found: Found) -> str:
    """The methods with their best rates (of equal ones the lowest), as lines below ``methods:`` of a config."""
    lines = []
    for name, figures in found.items():
        facts = comparison.methods[name] | {comparison.tuned_option(name): best_rate(figures)}
        text = yaml.safe_dump({name: facts}, default_flow_style=True, sort_keys=False, width=1000)
        lines.append(f"  {text.strip()[1:-1]}")
    return "\n".join(lines)


NO_VERDICT = (
    "The order is that of the config and ranks nothing: a verdict takes rates that one search chose on validation "
    "images, five seeds and six data sets (`randlora-pl sweep --tune`, `randlora-pl report`)."
)


def table(cells: list[Cell]) -> str:
    """A Markdown table: mean accuracy with its standard error, each rate and how it was chosen; no ranking."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.method, []).append(cell)
    lines = [
        "| method | trained parameters | learning rate | chosen by | accuracy, % | seconds |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for name, group in grouped.items():
        values = [100 * cell.accuracy for cell in group]
        error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else ""
        count = f"{group[0].trainable:,}" if group[0].trainable else "-"
        seconds = f"{statistics.median(cell.seconds for cell in group):.0f}" if group[0].seconds else "-"
        rate = "-" if group[0].rate is None else f"{group[0].rate:g}"
        accuracy = f"{statistics.mean(values):.1f}{error}"
        lines.append(f"| {name} | {count} | {rate} | {group[0].chosen or '-'} | {accuracy} | {seconds} |")
    return "\n".join([*lines, "", NO_VERDICT]) + "\n"
