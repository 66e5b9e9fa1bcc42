"""Sweep folders, made up: their accuracies follow a formula, with noise by a seeded generator."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from randlora_pl.lab.report.cells import read_plan

MODELS = {"CLIP-ViT-B/32": {"config": "clip_vitb32"}, "CLIP-ViT-L/14": {"config": "clip_vitl14"}}
DATASETS = ["cars", "dtd", "eurosat", "flowers102", "oxfordpets"]
BUDGETS = [1, 4, 16, "100%"]
METHODS = {
    "NoLA": {"adapter": "NoLA"},
    "VeRA-256": {"adapter": "VeRA"},
    "LoRA-16": {"adapter": "LoRA", "rank": 16},
    "LoRA-32": {"adapter": "LoRA", "rank": 32},
    "RandLoRA-6": {"adapter": "RandLoRA", "rank": 6, "paper_name": {"CLIP-ViT-L/14": "RandLoRA10"}},
    "full fine-tuning": {"adapter": "FullFineTuning", "paper_name": "FT"},
}
SIZES = {"NoLA": 147_456, "VeRA-256": 141_312, "LoRA-16": 3_440_640, "LoRA-32": 6_881_280, "RandLoRA-6": 5_170_320}
SIZES |= {"full fine-tuning": 151_277_313}
CLASSES = {"full fine-tuning": "FullFineTuning"}
SECONDS = {"LoRA-16": 0.88, "LoRA-32": 0.9, "RandLoRA-6": 1.1}
QUALITY = {"NoLA": 0.0, "VeRA-256": 2.0, "LoRA-16": 2.6, "LoRA-32": 3.0, "RandLoRA-6": 5.0, "full fine-tuning": 4.0}

Labels = dict[str, Any]


def description(**changes: Any) -> dict[str, Any]:
    content = {
        "title": "Made up",
        "paper": {"tables": [11, 12]},
        "models": MODELS,
        "datasets": DATASETS,
        "budgets": BUDGETS,
    }
    return content | {"methods": METHODS, "seeds": [1, 2, 3]} | changes


def sweep_yaml(content: dict[str, Any]) -> str:
    """The text of a ``sweep.yaml``; models without a config and methods without an adapter get one."""
    models = {label: {"config": "clip_vitb32"} | facts for label, facts in content["models"].items()}
    methods = {label: facts if label == "zero-shot" else {"adapter": "LoRA"} | facts
               for label, facts in content["methods"].items()}  # fmt: skip
    return yaml.safe_dump(content | {"models": models, "methods": methods}, sort_keys=False)


def write_cell(sweep: Path, labels: Labels, figures: dict[str, Any] | None = None, failed: str | None = None) -> Path:
    name = hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()[:12]
    folder = sweep / "cells" / name
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text(json.dumps(labels))
    if figures is not None:
        (folder / "results.json").write_text(json.dumps(figures))
    if failed is not None:
        (folder / "failed.json").write_text(json.dumps({"reason": failed, "time": "2026-11-25T12:00:00", "tries": 1}))
    return folder


def figures_of(labels: Labels, accuracy: float, device: str = "cuda") -> dict[str, Any]:
    method, large = labels["method"], 3 if labels["model"].endswith("L/14") else 1
    memory = {"full fine-tuning": 9.0, "LoRA-32": 7.3}.get(method, 7.0) * large
    return {
        "test/acc": accuracy,
        "zeroshot/acc": 0.4,
        "method": CLASSES.get(method, method.partition("-")[0]),
        "trainable_parameters": SIZES.get(method, 0),
        "fit_seconds": 60.0 * large * SECONDS.get(method, 1.0),
        "images_per_second": 900 / SECONDS.get(method, 1.0) / large,
        "peak_memory_bytes": int(memory * 1e9),
        "device": device,
        "version": "0.1.0",
        "git_commit": "0123456789abcdef",
        "finished": True,
    }


def write_sweep(
    folder: Path,
    content: dict[str, Any] | None = None,
    keep: Callable[[Labels], bool] = lambda labels: True,
    fail: Callable[[Labels], str | None] = lambda labels: None,
    more: Callable[[Labels], dict[str, Any]] = lambda labels: {},
    zeroshot: bool = True,
) -> Path:
    """A whole sweep: what is not kept was never run, what fails says why."""
    content = content or description()
    if zeroshot:
        content = content | {"methods": {"zero-shot": {}, **content["methods"]}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(sweep_yaml(content))
    for key in read_plan(folder).cells():
        for seed in [1] if key.method == "zero-shot" else content["seeds"]:
            labels = key._asdict() | {"seed": seed}
            if keep(labels):
                reason = fail(labels)
                figures = None if reason else figures_of(labels, accuracy(labels)) | more(labels)
                write_cell(folder, labels, figures, reason)
    return folder


def accuracy(labels: Labels) -> float:
    """A fraction of one that grows with data and the method's quality."""
    noise = random.Random(json.dumps(labels, sort_keys=True)).gauss(0, 0.8)
    step = {"zero-shot": -6, "1-shot": 0, "2-shot": 3, "4-shot": 8, "16-shot": 15, "50%": 18, "100%": 20}[
        labels["budget"]
    ]
    easy = 8 * ([*DATASETS, labels["dataset"]]).index(labels["dataset"]) / len(DATASETS)
    large = 6 if labels["model"].endswith("L/14") else 0
    return (50 + easy + step + large + QUALITY.get(labels["method"], 0) + noise) / 100
