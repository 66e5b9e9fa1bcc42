"""One table of every method on one few-shot data set: mean and standard error over seeds, beside plain baselines."""

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch import Trainer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from randlora_pl.adapters.files import make_adapter
from randlora_pl.data import ImageData
from randlora_pl.errors import UserError, near
from randlora_pl.tasks.restore import TASKS


@dataclass
class Comparison:
    """What to compare, as a YAML file says it.

    Attributes:
        model: Arguments of every task, such as ``name`` and ``pretrained``.
        data: Arguments of `ImageData`, such as ``dataset`` and ``shots``.
        methods: By the name in the table: ``task``, ``method``, ``options`` of the adapter, and further
            arguments of the task, such as ``learning_rate``.
        seeds: Each seed selects shots, order, augmentation, bases and initial values.
        learning_rates: What `tune` tries for every method.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    learning_rates: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Reads a YAML file.

        Raises:
            UserError: If it is none, or says something unknown.
        """
        try:
            return cls(**yaml.safe_load(path.read_text()))
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise UserError(f"{path} describes no comparison of methods ({error}).") from None

    def only(self, names: list[str] | None) -> "Comparison":
        """The comparison of some of its methods.

        Raises:
            UserError: If one is not in it.
        """
        for name in names or []:
            if name not in self.methods:
                raise UserError(f"the comparison has no method {name!r}.{near(name, self.methods)}")
        chosen = {name: facts for name, facts in self.methods.items() if names is None or name in names}
        return Comparison(self.model, self.data, chosen, self.seeds, self.learning_rates)


@dataclass(frozen=True)
class Cell:
    """One run: method, seed, accuracy as a fraction of 1, trained parameters, seconds of training."""

    method: str
    seed: int
    accuracy: float
    trainable: int = 0
    seconds: float = 0.0


def _trainer(**options: Any) -> Trainer:
    return Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, devices=1, **options,
    )  # fmt: skip


def run_cell(
    comparison: Comparison, name: str, seed: int, split: str = "test", **changes: Any
) -> tuple[Cell, float | None]:
    """Trains one method with one seed and evaluates it once.

    Args:
        comparison: The comparison.
        name: Name of the method in it.
        seed: The seed.
        split: ``test``, or ``val`` for a search that must not see the test images.
        changes: Arguments of the task to change, such as ``learning_rate``.

    Returns:
        The cell, and the accuracy before training where the task has one.
    """
    facts = dict(comparison.methods[name])
    kind = TASKS[facts.pop("task", "VisionLanguageTask")]
    adapter = make_adapter(facts.pop("method"), facts.pop("options", {}), name)
    task = kind(**{**comparison.model, **facts, **changes, "seed": seed}, adapter=adapter)
    data = ImageData(**comparison.data, seed=seed)
    before = _evaluate(task, data, split) if task.zero_shot else None
    trainer = _trainer(limit_val_batches=0)
    start = time.perf_counter()
    trainer.fit(task, data)
    seconds = time.perf_counter() - start
    trainable = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
    return Cell(name, seed, _evaluate(task, data, split), trainable, seconds), before


def _evaluate(task: Any, data: ImageData, split: str) -> float:
    trainer = _trainer()
    if split == "val":
        return float(trainer.validate(task, data, verbose=False)[0]["val/acc"])
    return float(trainer.test(task, data, verbose=False)[0]["test/acc"])


def baselines(comparison: Comparison, seed: int) -> Iterator[Cell]:
    """Two classifiers of raw pixels on the same images: logistic regression and the nearest neighbour."""
    data = ImageData(**comparison.data, seed=seed)
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
    settings = {"model": comparison.model, "data": comparison.data, "methods": comparison.methods}
    (output / "comparison.yaml").write_text(yaml.safe_dump(settings | {"seeds": comparison.seeds}, sort_keys=False))
    cells: list[Cell] = []
    for seed in comparison.seeds:
        cells += baselines(comparison, seed)
        for name in comparison.methods:
            cell, before = run_cell(comparison, name, seed)
            if before is not None and Cell("zero-shot", seed, before) not in cells:
                cells.append(Cell("zero-shot", seed, before))
            cells.append(cell)
            say(f"{name}, seed {seed}: {100 * cell.accuracy:.1f} % in {cell.seconds:.0f} s, {cell.trainable:,} trained")
            _write(output / "cells.json", json.dumps([vars(c) for c in cells], indent=1) + "\n")
            _write(output / "table.md", table(cells))
    return output


def tune(comparison: Comparison, seed: int = 0, say: Any = print) -> dict[str, dict[float, float]]:
    """Validation accuracy of every method at every learning rate; the test images are not read.

    Args:
        comparison: With ``learning_rates``.
        seed: A seed that the comparison itself does not use.
        say: Receives a line for each finished run.
    """
    if seed in comparison.seeds:
        raise UserError(f"seed {seed} is one of the comparison's own; tune with another.")
    found: dict[str, dict[float, float]] = {}
    for name in comparison.methods:
        for rate in comparison.learning_rates:
            cell, _ = run_cell(comparison, name, seed, "val", learning_rate=rate)
            found.setdefault(name, {})[rate] = cell.accuracy
            say(f"{name} at {rate:g}: {100 * cell.accuracy:.1f} % on validation")
    return found


def table(cells: list[Cell]) -> str:
    """A Markdown table: accuracy in per cent as mean and standard error, in order of the mean."""
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.method, []).append(cell)
    lines = ["| method | trained parameters | accuracy, % | seconds |", "|---|---:|---:|---:|"]
    for name, group in sorted(grouped.items(), key=lambda item: -statistics.mean(c.accuracy for c in item[1])):
        values = [100 * cell.accuracy for cell in group]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        count = f"{group[0].trainable:,}" if group[0].trainable else "-"
        seconds = f"{statistics.median(cell.seconds for cell in group):.0f}" if group[0].seconds else "-"
        lines.append(f"| {name} | {count} | {statistics.mean(values):.1f} ± {error:.1f} | {seconds} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
