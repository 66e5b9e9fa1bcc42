"""``sweep NAME --tune``: the search of learning rates before the sweep, resumed as one."""

import argparse
import copy
import shlex
import time
from pathlib import Path

from randlora_pl.commands.sweep.job import find_sweep
from randlora_pl.commands.sweep.run import dry_run
from randlora_pl.commands.sweep.tuning import comments, search_of
from randlora_pl.sweep.description import is_zero_shot
from randlora_pl.sweep.folder import TUNE
from randlora_pl.utils.errors import UserError


def tune_first(typed: argparse.Namespace, same: str) -> tuple[argparse.Namespace, list[str]] | None:
    """Search the rates of a sweep.

    Args:
        typed: The options of ``sweep``.
        same: The typed command, for resuming.

    Returns:
        The options of the sweep with the best rates, and its words; None if the search is not finished.
    """
    options = {"--shard": typed.shard, "--seeds": typed.seeds, "--launcher slurm": typed.launcher == "slurm"}
    for option in filter(options.get, options):
        raise UserError(
            f"--tune cannot be combined with {option}. Search first: randlora-pl tune {shlex.quote(typed.config)}"
        )
    start = time.monotonic()
    file, description = find_sweep(typed.config)
    output = typed.output or Path("runs") / "sweeps" / file.stem
    if any((output / "cells").glob("*")) and not (output / TUNE).is_dir():
        raise UserError(
            f"{output} has cells that were run without a search. Use another folder for the tuned cells: "
            f"--tune --output {shlex.quote(str(output))}-tuned"
        )
    searched = copy.copy(typed)
    searched.only = [word for word in typed.only if _concerns(word)]
    found = search_of(searched, file, description, output / TUNE, same)
    typed.output = output
    tuned = output / TUNE / "tuned.yaml"
    if typed.dry_run:
        dry_run(found.job)
        print("\nThen, with the best rates:\n")
        typed.config = str(tuned) if tuned.is_file() else typed.config
        return typed, []
    words = [TUNE, str(file), "--output", str((output / TUNE).resolve()), *_options(typed, searched.only)]
    found.run(typed, words, comments(file))
    if found.stopped:
        return None
    typed.config = str(tuned)
    if typed.max_hours is not None:
        typed.max_hours = max(1e-9, typed.max_hours - (time.monotonic() - start) / 3600)
    return typed, [str(tuned.resolve()), *_options(typed, typed.only)]


def _concerns(word: str) -> bool:
    """Return True if an ``--only`` restricts the search, too; the pretrained model has no rate."""
    key, _, value = word.partition("=")
    return key in ("model", "dataset") or (key == "method" and not is_zero_shot(value))


def _options(typed: argparse.Namespace, only: list[str]) -> list[str]:
    """Return the options as arguments of another process."""
    words = ["--only", *only] if only else []
    words += ["--retry-failed"] * typed.retry_failed + ["--skip-missing"] * typed.skip_missing
    words += ["--max-hours", str(typed.max_hours)] if typed.max_hours is not None else []
    return words + (["--data.root", typed.root] if typed.root is not None else [])
