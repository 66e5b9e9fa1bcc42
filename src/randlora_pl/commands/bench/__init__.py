"""Measure the speed of this machine. Everything compared is timed in turns, in one run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from randlora_pl.commands.common.terminal import counting
from randlora_pl.run.run_folder import check_new, missing_folders, output_folder, remove_folder
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import Count, Option

JSON, TABLE, PICTURE = "bench.json", "table.md", "bench.png"
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Options of all measurements.

    Attributes:
        precision: bf16: autocast. bf16-frozen: frozen weights in bfloat16, too
        rounds: Number of measurements of everything
        threads: CPU threads of PyTorch (default: its own choice)
        device: Device of the models (default: cuda if available)
        output: New folder for bench.json, table.md and bench.png (default: runs/bench-NAME/TIME)
    """

    precision: Literal["32", "bf16", "bf16-frozen"] = "32"
    rounds: Count = 3
    threads: Count | None = None
    device: Literal["cpu", "cuda"] | None = None
    output: Annotated[str | None, Option("DIR", read=check_new)] = None

    @property
    def numbers(self) -> str:
        """Description of the precision."""
        autocast = "bfloat16 autocast"
        return {"32": "float32", "bf16": autocast, "bf16-frozen": f"{autocast} and frozen weights"}[self.precision]

    def prepare(self) -> tuple[str, dict[str, Any]]:
        """Set the threads; return the device, and facts about the machine."""
        import torch

        from randlora_pl.lab.bench.costs import machine

        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here (see: randlora-pl doctor); use --device cpu")
        if self.threads:
            torch.set_num_threads(self.threads)
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu"), machine()


def measuring(total: int) -> AbstractContextManager[Any]:
    """Return the progress of measurements on the terminal."""
    return counting(True, "{task.completed} of {task.total} measurements", total)


def machine_line(facts: dict[str, Any], device: str) -> str:
    """Return a short description of the machine for tables."""
    name = facts["gpu"] if device == "cuda" else f"{facts['processor']}, {facts['threads']} threads"
    return f"{name}, torch {facts['torch']}"


def in_folder(
    output: str | None,
    verb: str,
    work: Callable[[Callable[[T], None]], T],
    note: Callable[[T, Path], None],
    finish: Callable[[T, Path], None],
) -> None:
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
        keep(work(keep))
        finish(kept[0], folder)
    except BaseException as stop:
        if not kept:
            remove_folder(folder, missing)
        elif isinstance(stop, KeyboardInterrupt):
            finish(kept[0], folder)
            raise KeyboardInterrupt(f"the finished results are in {folder}") from stop
        raise
    print(f"\nResults: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
