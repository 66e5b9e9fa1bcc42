"""Batches whose samples have several adapters, timed against one adapter for all and against single passes."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from randlora_pl.adapters import AdapterSet, adapted_layers, read_adapter, save_adapter
from randlora_pl.adapters.batched import PerSample
from randlora_pl.lab.bench import Spread, adapted, in_turns, ratios, synchronize
from randlora_pl.lab.bench.steps import Training

COUNTS = (1, 8, 32)
"""Numbers of adapters in a batch."""

Seconds = dict[str, list[float]]
"""Times of each case, one per round."""


def cells(seconds: Seconds) -> list[str]:
    """Return milliseconds with one adapter, and the other times relative to these."""
    first, *others = seconds.values()
    return [f"{1000 * Spread.over(first).median:,.0f}", *(f"{ratios(own, first):.2f}" for own in others)]


def measure(training: Training, name: str, rounds: int, tick: Callable[[str], None]) -> tuple[str, Seconds]:
    """Load a method as often as needed into one base model, and time its batches interleaved.

    Returns:
        How layers apply the updates of several adapters, and the times.
    """
    tuned = adapted(training.base, name, training.rank(name), training.setup.targets).eval()
    adapters, images = AdapterSet(training.base.eval().to(training.device)), training.batch[0]
    with TemporaryDirectory() as folder:
        file = read_adapter(save_adapter(tuned.cpu(), Path(folder) / "adapter"))
    for number in range(max(COUNTS)):
        adapters.load(str(number), file)
    applied: set[str] = set()

    def together(count: int) -> None:
        with adapters.batched([str(row % count) for row in range(len(images))]) as model:
            model(images)
            updates = [layer.delta for layer in adapted_layers(model).values()]
            applied.update(
                "by adapter" if each.alone else "together" for each in updates if isinstance(each, PerSample)
            )

    def single() -> None:
        for row, image in enumerate(images):
            with adapters.using(str(row)) as model:
                model(image[None])

    def timed(work: Callable[[], None]) -> float:
        synchronize(training.device)
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast(training.device.type, torch.bfloat16, training.setup.precision != "32"):
            work()
        synchronize(training.device)
        return time.perf_counter() - start

    works: dict[str, Callable[[], None]] = {f"{count} adapters": partial(together, count) for count in COUNTS}
    turns = {case: partial(timed, work) for case, work in (works | {"single passes": single}).items()}
    for turn in turns.values():  # the first calls find the samples in the inputs of layers
        turn()
    return " and ".join(sorted(applied)), in_turns(turns, rounds, tick, lambda _: None)
