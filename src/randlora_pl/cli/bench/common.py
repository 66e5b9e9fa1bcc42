"""Shared parts of the ``bench`` commands: options, description of the machine, output folder, interruption."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from randlora_pl.cli.common.arguments import Parser
from randlora_pl.engine.run_folder import check_new, missing_folders, output_folder, remove_folder
from randlora_pl.utils.errors import UserError

PRECISIONS = {
    "32": "float32",
    "bf16": "bfloat16 autocast",
    "bf16-frozen": "bfloat16 autocast and frozen weights",
}
"""Precisions of a step, with their descriptions."""
JSON, TABLE, PICTURE = "bench.json", "table.md", "bench.png"
T = TypeVar("T")


def parser_of(verb: str, rounds: int) -> Parser:
    """Return a parser with the shared options of these commands.

    Args:
        verb: What is measured.
        rounds: Default number of repetitions.
    """
    parser = Parser(f"bench {verb}", "bench")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="32")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--output")
    return parser


def prepare(typed: argparse.Namespace, positive: Sequence[str]) -> dict[str, Any]:
    """Check the shared options, set threads, select the device, and silence the libraries.

    Args:
        typed: The options; ``device`` is filled in.
        positive: Names of further numbers, or lists of them, that must be positive.

    Returns:
        Facts about the machine.

    Raises:
        UserError: A number is not positive, the folder exists, or no GPU was found.
    """
    for name in (*positive, "rounds", "threads"):
        value = getattr(typed, name)
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if number < 1:
                raise UserError(f"--{name.replace('_', '-')} is {number}: give a positive whole number")
    check_new(typed.output)
    from randlora_pl.utils.text.console import log_to_terminal
    from randlora_pl.utils.text.log_filters import silence_library_warnings

    silence_library_warnings()
    log_to_terminal()
    import torch

    from randlora_pl.bench.timing import machine

    if typed.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here (see: randlora-pl doctor); use --device cpu")
    typed.device = typed.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if typed.threads:
        torch.set_num_threads(typed.threads)
    return machine()


def place(facts: dict[str, Any], device: str) -> str:
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

    Raises:
        UserError: The folder cannot be made.
        KeyboardInterrupt: With the path of the results.
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
            raise KeyboardInterrupt(f"what was finished is in {folder}") from stop
        raise
    print(f"\nFigures: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    return folder
