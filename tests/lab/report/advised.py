"""Sweeps of one dataset, made up for a recommendation: as a table of right answers, or as folders of runs."""

from pathlib import Path
from typing import Any

import numpy as np

from randlora_pl.lab.report.cells import FINISHED, Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.utils.text import csv_text, pack_bits
from tests.lab.report.sweeps import sweep_yaml, write_cell

KINDS = {
    "linear probe": ("LinearProbe", 1_290, 9.0),
    "LoRA": ("LoRA", 19_000, 21.0),
    "HiRA": ("HiRA", 18_000, 25.0),
    "full fine-tuning": ("FullFineTuning", 1_500_000, 40.0),
}
PROBE, LORA, HIRA, FULL = KINDS
RATE = 0.01


def facts_of(kind: str) -> dict[str, Any]:
    if kind == "LinearProbe":
        return {"adapter": kind, "task": "LinearHeadTask", "head_learning_rate": RATE}
    return {"adapter": kind, "learning_rate": RATE}


def answers(accuracy: float, samples: int, seeds: int = 5, jitter: float = 0.0) -> np.ndarray:
    """Which test pictures each seed gets right, (seeds, samples): the easiest ones, with some luck at the limit."""
    luck = np.random.default_rng(0).normal(0, jitter, (seeds, samples)) if jitter else 0.0
    hard = np.random.default_rng(1).permutation(samples) + 0.5
    right: np.ndarray = (hard + luck)[None].reshape(-1, samples) < accuracy / 100 * samples
    return np.broadcast_to(right, (seeds, samples))


def made(
    folder: Path,
    runs: dict[str, np.ndarray],
    zero: float | None = None,
    failed: dict[str, str] | None = None,
    **changes: Any,
) -> Sweep:
    """A sweep by its table, as a report has it; rates are tuned, but for the methods of ``untuned``."""
    untuned, kinds = changes.pop("untuned", ()), KINDS | changes.pop("kinds", {})
    columns = ["model", "dataset", "budget", "method", "seed", "state", "reason", "accuracy", "zeroshot_accuracy"]
    columns += ["learning_rate", "adapter", "task", "trainable_parameters", "fit_seconds", "device", "test/right"]
    rows = []
    for method, right in runs.items():
        kind, size, seconds = kinds[method]
        rest = [RATE, kind, facts_of(kind).get("task", "VisionLanguageTask"), size, seconds, "cpu"]
        for seed, bits in enumerate(right, 1):
            scores = [100 * bits.mean(), zero]
            rows.append(["CLIP", "birds", "100%", method, seed, FINISHED, "", *scores, *rest, pack_bits(bits.tolist())])
    for method, reason in (failed or {}).items():
        rows.append(["CLIP", "birds", "100%", method, 1, "failed", reason, *[None] * 9])
    methods = {method: facts_of(kinds.get(method, ["LoRA"])[0]) for method in [*runs, *(failed or {})]}
    entries = {
        name: {"method": facts, "chosen": {key: RATE for key in facts if key.endswith("rate")}, "tried": []}
        for name, facts in methods.items()
        if name not in untuned
    }
    models = {"CLIP": {"config": "clip_vitb32"}}
    tuned = {"finished": True, "split": "val", "monitor": "val/acc", "seeds": [9], "models": models, "methods": entries}
    content = {"models": models, "datasets": ["birds"], "budgets": ["100%"], "methods": methods, "tuned": tuned}
    folder.mkdir(parents=True, exist_ok=True)
    seeds = list(range(1, 1 + max(map(len, runs.values()))))
    (folder / "sweep.yaml").write_text(sweep_yaml(content | {"seeds": seeds} | changes))
    (folder / "cells.csv").write_text(csv_text([columns, *rows]))
    return read_sweep(folder)


def near(accuracy: float, samples: int = 4_000) -> np.ndarray:
    return answers(accuracy, samples, jitter=4)


def changed(right: np.ndarray, gained: int, lost: int) -> np.ndarray:
    """The same answers but for some pictures that no seed had right, and some that each had."""
    right, never, always = right.copy(), ~right.any(0), right.all(0)
    right[:, never.nonzero()[0][:gained]] = True
    right[:, always.nonzero()[0][:lost]] = False
    return right


CLASSES = ["great tit", "blue tit", "robin", "house sparrow", "eurasian tree sparrow"]
COMMANDS = {
    method: f"randlora-pl fit --config siglip2_vitb16 --data.root birds --model.adapter {kind} "
    f"--model.learning_rate {RATE} --data.train_split full"
    for method, (kind, *_) in KINDS.items()
}


def stored(folder: Path, runs: dict[str, np.ndarray], failed: dict[str, str], classes: list[str] = CLASSES) -> Sweep:
    """A sweep as the program leaves it: a folder for each run, with its curves and its confusion matrix."""
    made(folder, runs, failed=failed, title="Which adapter for birds?")
    (folder / "cells.csv").unlink()
    labels = {"model": "CLIP", "dataset": "birds", "budget": "100%"}
    for method, reason in failed.items():
        write_cell(folder, labels | {"method": method, "seed": 1}, failed=reason)
    for method, right in runs.items():
        kind, size, seconds = KINDS[method]
        rate = {name: value for name, value in facts_of(kind).items() if name.endswith("rate")}
        for seed, bits in enumerate(right, 1):
            task = facts_of(kind).get("task", "VisionLanguageTask")
            facts = {"method": kind, "task": task, "device": "cuda", "finished": True, "steps": 80, **rate}
            facts |= {"test/acc": bits.mean(), "test/right": pack_bits(bits.tolist()), "zeroshot/acc": 0.6}
            facts |= {"trainable_parameters": size, "total_parameters": 1_500_000, "adapter_bytes": 4 * size}
            facts |= {"fit_seconds": seconds + seed / 10, "images_per_second": 900 / seconds}
            facts |= {"peak_memory_bytes": int(1e9 + 1e3 * size)}
            facts |= {"zeroshot/elsewhere/digits": 0.5, "test/elsewhere/digits": 0.5 - size / 1e7}
            cell = write_cell(folder, labels | {"method": method, "seed": seed}, facts)
            lines = ["step,train/loss,val/acc"]
            for step in range(1, 81):
                lines.append(f"{step},{2 - step / 80 - bits.mean() / 2},")
                lines += [f"{step},,{bits.mean() - 0.2 + step / 400}"] * (step % 20 == 0)
            (cell / "csv").mkdir()
            (cell / "csv/metrics.csv").write_text("\n".join(lines) + "\n")
            rng = np.random.default_rng(seed)
            counts = [[classes[true], *(rng.poisson(2, len(classes)) + 80 * np.eye(len(classes), dtype=int)[true])]
                      for true in range(len(classes))]  # fmt: skip
            (cell / "figures").mkdir()
            (cell / "figures/confusion.csv").write_text(csv_text([["true/predicted", *classes], *counts]))
    return read_sweep(folder)
