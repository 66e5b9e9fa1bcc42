"""Shared parts of the ``bench`` commands: options, description of the machine, output folder, interruption."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from randlora_pl.commands.common.arguments import CommandParser, check_positive
from randlora_pl.commands.common.progress import counting
from randlora_pl.run.run_folder import check_new, missing_folders, output_folder, remove_folder
from randlora_pl.utils.errors import UserError

_BF16 = "bfloat16 autocast"
PRECISIONS = {"32": "float32", "bf16": _BF16, "bf16-frozen": f"{_BF16} and frozen weights"}
"""Precisions of a step, with their descriptions."""
JSON, TABLE, PICTURE = "bench.json", "table.md", "bench.png"
T = TypeVar("T")


def parser_of(verb: str, rounds: int) -> CommandParser:
    """Return a parser with the shared options of these commands; ``rounds`` is the default number of repetitions."""
    parser = CommandParser(f"bench {verb}")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="32")
    parser.add_options(rounds=rounds, threads=int, device=("cpu", "cuda"), output=str)
    return parser


def prepare(typed: argparse.Namespace, positive: Sequence[str]) -> dict[str, Any]:
    """Check the shared options, set threads, and select the device.

    Args:
        typed: The options; ``device`` is filled in.
        positive: Names of further numbers, or lists of them, that must be positive.

    Returns:
        Facts about the machine.
    """
    check_positive(typed, *positive, "rounds", "threads")
    check_new(typed.output)
    import torch

    from randlora_pl.lab.bench.timing import machine

    if typed.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here (see: randlora-pl doctor); use --device cpu")
    typed.device = typed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if typed.threads:
        torch.set_num_threads(typed.threads)
    return machine()


def measuring(total: int) -> AbstractContextManager[Any]:
    """Return the progress of measurements on the terminal."""
    return counting(True, "{task.completed} of {task.total} measurements", total)


def setup_of(typed: argparse.Namespace) -> dict[str, Any]:
    """Return the options that measurements depend on."""
    return {name: value for name, value in vars(typed).items() if name != "output"}


def machine_line(facts: dict[str, Any], device: str) -> str:
    """Return a short description of the machine for tables."""
    name = facts["gpu"] if device == "cuda" else f"{facts['processor']}, {facts['threads']} threads"
    return f"{name}, torch {facts['torch']}"


def command(verb: str, args: Sequence[str]) -> str:
    """Return the command line without the output folder."""
    words = list(args)
    if "--output" in words:
        at = words.index("--output")
        del words[at : at + 2]
    return shlex.join(["randlora-pl", "bench", verb, *words])


def in_folder(
    output: str | None,
    verb: str,
    work: Callable[[Callable[[T], None]], T],
    note: Callable[[T, Path], None],
    finish: Callable[[T, Path], None],
) -> Path:
    """Run the work and write its results to a new folder; an interruption keeps finished ones.

    Args:
        output: The requested folder; None for ``runs/bench-VERB/TIME``.
        verb: What is measured.
        work: Function that gets a callback for intermediate results; returns all results.
        note: Function that writes intermediate results.
        finish: Function that writes and prints the results.
    """
    new = Path(output or f"runs/bench-{verb}").absolute()
    missing = missing_folders(new.parent if output else new)
    folder = output_folder(output, f"bench-{verb}")
    kept: list[T] = []

    def keep(results: T) -> None:
        kept[:] = [results]
        note(results, folder)

    try:
        finish(work(keep), folder)
    except BaseException as stop:
        if not kept:
            remove_folder(folder, missing)
        elif isinstance(stop, KeyboardInterrupt):
            finish(kept[0], folder)
            raise KeyboardInterrupt(f"the finished results are in {folder}") from stop
        raise
    print(f"\nResults: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    return folder
