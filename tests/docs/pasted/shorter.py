"""Pasted commands with less to compute: the same commands, on small models and with few steps."""

import os
import sys
from pathlib import Path

import yaml

from randlora_pl.run.options.shipped import find_config
from randlora_pl.utils.errors import UserError
from tests.docs.pasted.blocks import wheel
from tests.test_readme import SHORT, TINY

DECODER = "{num_hidden_layers: 1, hidden_size: 112, intermediate_size: 128, vocab_size: 300}"
LIMITS = {"trainer.limit_val_batches": 1, "trainer.limit_test_batches": 1, "trainer.accelerator": "cpu"}
SHAPES = {"roberta": TINY["glue"], "Qwen2": TINY["commonsense"], "qwen2": TINY["commonsense"]}
if wheel() is None:
    SHAPES["smollm2"] = "{num_hidden_layers: 1, hidden_size: 144, intermediate_size: 128, vocab_size: 300}"
BENCH = {
    "train": ("--rounds", "1", "--batch-size", "2"),
    "batch": ("--rounds", "1", "--model", "test_vit"),
    "adapters": ("--rounds", "1", "--widths", "64", "--tokens", "8", "--ranks", "8", "--depths", "1"),
}


def sweep(name: str) -> str:
    """Write a sweep beside the shipped one or the file: its first budget and seed, two methods, a step, two rates."""
    try:
        file = find_config(name)
    except UserError:
        return name
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if isinstance(settings.get("datasets", "all"), str):  # of the paper: there is nothing here that could run
        return name
    settings.pop("tuned", None)
    methods = settings["methods"]
    kept = [one for one in ("RandLoRA-6", "linear probe") if one in methods] or list(methods)[:2]
    settings |= {"budgets": settings["budgets"][:1], "seeds": settings["seeds"][:1]}
    settings["methods"] = {one: methods[one] for one in kept}
    settings["set"] = settings.get("set", {}) | LIMITS | {"data.steps": 1, "data.batch_size": 8}
    settings["tune"] = {"search": {"learning_rate": [1e-3, 1e-2]}, "seeds": [0, 4]}
    made = Path(os.environ["SHORTER"]) / f"{file.stem}.yaml"
    made.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return str(made)


def run_of(words: list[str]) -> list[str]:
    """A training in two steps; models with weights from a hub get random ones and a small shape."""
    if "--trainer.accelerator" in words:  # the one that is not there
        return words
    more = list(SHORT)
    if "--data.epochs" in words:
        words[words.index("--data.epochs") + 1] = "2"
        place = more.index("--data.steps")
        del more[place : place + 2]
    for name, shape in SHAPES.items():
        if any(name in word for word in words) and "--model.config_overrides" not in words:
            more += ["--model.pretrained", "random", "--model.config_overrides", shape]
            break
    return [*words, *more]


def shorter(words: list[str]) -> list[str]:
    """Return the words of a command with options that shorten it."""
    command, second = (*words, "", "")[:2]
    if {"--help", "--print_config"} & set(words):
        return words
    goes_on = "--resume" in words and "auto" not in words
    if (command == "fit" and not goes_on) or words[:2] == ["tune", "--config"]:
        return run_of(words)
    if command in ("sweep", "tune"):
        words = [command, sweep(second), *words[2:]]
        return [*words, "--jobs", "1"]
    if command == "compare-methods":  # a test runs all of it, in minutes
        return [*words, "--dry-run"]
    if command == "bench":
        more = list(BENCH[second])
        if second == "train":
            decoder = any("Qwen" in word for word in words)
            more += ["--overrides", DECODER, "--tokens", "8"] if decoder else ["--model", "vit_tiny_patch16_224"]
        return [*words, *more]
    if words[:2] == ["analyze", "landscape"]:
        return [*words, "--grid", "3"]
    if words[:2] == ["analyze", "kernel"]:
        return [*words, "--samples", "4", "--batches", "1"]
    if words[:2] == ["analyze", "represent"]:
        return [*words, "--ranks", "2", "--sweeps", "1"]
    return words


if __name__ == "__main__":
    from randlora_pl.commands.main import main

    sys.exit(main(shorter(sys.argv[1:])))
