"""Batches whose samples have several adapters, timed beside one adapter for all and beside single passes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from randlora_pl.adapters import AdapterSet, read_adapter, save_adapter
from randlora_pl.adapters.batched import joint_key
from randlora_pl.adapters.operations import adapted_layers
from randlora_pl.lab.bench import adapted, in_turns, ratios, synchronize
from randlora_pl.lab.bench.steps import Training

ONE, SINGLE = "one adapter", "single passes"


@dataclass
class Batch:
    """Seconds of a batch by case, one value per round, and how a layer applies the updates of several adapters."""

    method: str
    applied: str
    seconds: dict[str, list[float]]

    def cells(self) -> list[str]:
        """Return the row of a table: milliseconds with one adapter, and ratios to these."""
        first, *others = self.seconds.values()
        return [
            self.method,
            self.applied,
            f"{1000 * min(first):,.0f}",
            *(f"{ratios(own, first):.2f}" for own in others),
        ]


def measure(training: Training, name: str, counts: Sequence[int], rounds: int, tick: Callable[[str], None]) -> Batch:
    """Load a method as often as needed into one base model, and time its batches in turns."""
    tuned = adapted(training.base, name, training.rank(name), training.setup.targets).eval()
    kinds = {joint_key(layer.delta) for layer in adapted_layers(tuned).values() if layer.delta is not None}
    adapters, images = AdapterSet(training.base.eval().to(training.device)), training.batch[0]
    with TemporaryDirectory() as folder:
        file = read_adapter(save_adapter(tuned.cpu(), Path(folder) / "adapter"))
    for number in range(most := max(counts)):
        adapters.load(str(number), file)

    def together(count: int) -> None:
        with adapters.batched([str(row % count) for row in range(len(images))]) as model:
            model(images)

    def single() -> None:
        for row, image in enumerate(images):
            with adapters.using(str(row % most)) as model:
                model(image[None])

    def timed(work: Callable[[], None]) -> float:
        synchronize(training.device)
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast(training.device.type, torch.bfloat16, training.setup.precision != "32"):
            work()
        synchronize(training.device)
        return time.perf_counter() - start

    works: dict[str, Callable[[], None]] = {ONE: partial(together, 1)}
    works |= {f"{count} adapters": partial(together, count) for count in counts if count > 1}
    works[SINGLE] = single
    for work in works.values():  # the first calls find the samples in the inputs of layers
        work()
    turns = {case: partial(timed, work) for case, work in works.items()}
    seconds = in_turns(turns, rounds, tick, lambda _: None)
    return Batch(training.label(name), "by adapter" if None in kinds else "together", seconds)
