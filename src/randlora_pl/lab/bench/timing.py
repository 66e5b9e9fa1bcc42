"""Measurements taken in turns, with their spread: machines are noisy, and what runs beside slows all cases alike."""

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} .. {self.high:{spec}})"


def in_turns(
    cases: Mapping[str, Callable[[], float]],
    rounds: int,
    tick: Callable[[str], None] = lambda _: None,
    *,
    warm_up: bool = True,
    to_and_fro: bool = False,
    after_round: Callable[[dict[str, list[float]]], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Return the measurements of each case, one per round; every round goes through all cases.

    Args:
        cases: Functions to measure, by name; each call returns one value.
        rounds: Measurements of each case.
        tick: Called with the name of the case that is measured next.
        warm_up: Whether a round that does not count comes first.
        to_and_fro: Whether every other round goes backwards, so that no case always follows the same one,
            which leaves it caches and an allocator in its own state.
        after_round: Given the measurements so far after each round that counts.
    """
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1 if warm_up else 0, rounds):
        order = list(cases)
        for name in order[::-1] if to_and_fro and number % 2 else order:
            tick(name)
            value = cases[name]()
            if number >= 0:
                values[name].append(value)
        if number >= 0:
            after_round({name: list(found) for name, found in values.items()})
    return values


def batches_ahead(workers: int) -> int:
    """Return the number of uncounted batches: made while the last worker started, or the first one."""
    return max(1, 3 * workers)  # one in the making and PyTorch's two in advance for each


def ratios(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of the ratios that the rounds give, each to the base of its own round."""
    return Spread.of([one / other for one, other in zip(values, base, strict=True)])


def machine() -> dict[str, Any]:
    """Return facts that affect timings: processor, cores this process may use, and versions."""
    import torch

    from randlora_pl.utils.machine import usable_cores

    facts: dict[str, Any] = {"processor": processor(), "cores": usable_cores(), "threads": torch.get_num_threads()}
    facts["torch"] = torch.__version__
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"python": platform.python_version()}


def processor() -> str:
    """Return the processor's name, as far as the system reports it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (a device file, read line by line)
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
