"""Training steps as things to measure: their seconds, and, outside the clock, their memory and operations."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from randlora_pl.adapters.kernels.randlora_linear import end_step
from randlora_pl.lab.bench import costs
from randlora_pl.lab.bench.methods import UnavailableError
from randlora_pl.models import cast_frozen, use_fast_layers

Precision = Literal["32", "bf16", "bf16-frozen"]
"""``bf16`` is autocast; ``bf16-frozen`` has frozen matrices in bfloat16 as well."""
_LEAST = 0.4  # seconds of steps in one measurement, at least
_PEAK = "matrix product"


class Case:
    """A model that trains, measured step by step; on the device only while it is measured.

    A GPU so holds one case at a time, and its peak is the case's. A case that runs out of memory is
    dropped and reports it.

    Args:
        name: Name on the command line.
        label: Name in tables.
        model: On the CPU.
        loss: The forward pass: the model to a scalar.
        inputs: Tensors on the device that the forward pass reads. One that asks for a gradient stands for
            what layers below would give, and counts as kept for the backward pass; the others do not.
        device: Device of the measurement.
        optimize: Whether AdamW is part of the step.
        foreign: Whether its errors are reported instead of raised.
    """

    def __init__(
        self,
        name: str,
        label: str,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        inputs: Sequence[Tensor],
        *,
        device: torch.device,
        precision: Precision = "32",
        optimize: bool = True,
        foreign: bool = False,
    ) -> None:
        self.name, self.label, self.model, self.loss, self.inputs = name, label, model, loss, inputs
        self.device, self.precision, self.foreign = device, precision, foreign
        if precision == "bf16-frozen":
            cast_frozen(model, torch.bfloat16)
        use_fast_layers(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer: Optimizer | None = AdamW(trained, lr=1e-4, fused=True) if optimize else None
        self.saved = self.flops = 0
        self.peak: int | None = None
        self.problem = ""
        self._repeat = 1

    def step(self) -> None:
        """Forward pass, backward pass, optimizer, gradients dropped."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "32"):
            loss = self.loss(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            self.optimizer.step()
        else:
            end_step()  # else the next repetition would be a further micro-batch, which builds nothing
        self.model.zero_grad()
        for tensor in self.inputs:
            tensor.grad = None

    def count(self) -> None:
        """Run a first step to count memory and operations, and a second one for the time, and on a GPU the peak."""
        with self._guarded(), self._present():
            batch = (tensor for tensor in self.inputs if not tensor.requires_grad)
            outside = chain(self.model.parameters(), self.model.buffers(), batch)
            start = time.perf_counter()
            with costs.saved_tensors(outside) as saved, costs.counter() as operations:
                self.step()
            self.saved, self.flops = sum(saved.values()), operations.get_total_flops()
            on_gpu = self.device.type == "cuda"
            if on_gpu or time.perf_counter() - start < 10 * _LEAST:  # not the time of a usual step
                costs.synchronize(self.device)
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(self.device)
                start = time.perf_counter()
                self.step()
                costs.synchronize(self.device)
                self.peak = int(torch.cuda.max_memory_allocated(self.device)) if on_gpu else None
            self._repeat = max(1, round(_LEAST / (time.perf_counter() - start)))

    def seconds(self) -> float:
        """Return the seconds of a step, the mean of as many as fill some tenths of a second; NaN after a problem."""
        found = float("nan")
        if self.problem:
            return found
        with self._guarded(), self._present():
            if self.device.type == "cuda":  # the allocator starts again each time
                self.step()
                self.step()
            costs.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(self._repeat):
                self.step()
            costs.synchronize(self.device)
            found = (time.perf_counter() - start) / self._repeat
        return found  # noqa: RET504 (still NaN where a problem ended the block)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Note that the block ran out of memory, or any error of a foreign method, and drop the model then."""
        try:
            yield
        except Exception as error:
            if costs.is_out_of_memory(error):
                self.problem = costs.OUT_OF_MEMORY
            elif self.foreign:
                self.problem = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            else:
                raise
        if self.problem:  # outside the except block, which holds the frames
            self.model, self.optimizer = nn.Identity(), None

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Hold the model and the optimizer's state on the device inside the block only."""
        if self.device.type == "cpu":
            yield
            return
        try:
            self._move(self.device)
            yield
        finally:
            self.model.zero_grad()
            self._move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def _move(self, device: torch.device) -> None:
        self.model.to(device)
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                state.update({key: value.to(device) for key, value in state.items() if isinstance(value, Tensor)})


@dataclass
class Measured:
    """Measurements of a case, or the reason for none.

    Attributes:
        trained: Parameters that train.
        saved: Bytes kept for the backward pass, without parameters, buffers and the batch.
        flops: Operations of a step.
        peak: On a GPU the allocator's peak in bytes.
        rss: Largest resident set in bytes of a process that trains nothing else, where it was asked for.
        seconds: Seconds of a step, one value per round.
        rates: Operations a second of a large matrix product in the same rounds.
    """

    name: str
    label: str
    problem: str = ""
    trained: int = 0
    saved: int = 0
    flops: int = 0
    peak: int | None = None
    rss: int | None = None
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def spread(self) -> costs.Spread | None:
        """Return the spread of the seconds."""
        return costs.Spread.over(self.seconds) if self.seconds else None

    def ratio(self, base: "Measured | None") -> costs.Spread | None:
        """Return the seconds relative to another case, round by round."""
        return costs.ratios(self.seconds, base.seconds) if base and base.seconds and self.seconds else None

    def of_peak(self) -> float | None:
        """Return the operations per second, as the median fraction of the matrix product's in the same round."""
        fractions = [self.flops / one / rate for one, rate in zip(self.seconds, self.rates, strict=True)]
        return median(fractions) if fractions else None


def measure(
    cases: Sequence[Case],
    gemm: costs.Gemm,
    rounds: int,
    tick: Callable[[str], None] = lambda _: None,
    keep: Callable[[list[Measured]], None] = lambda _: None,
) -> list[Measured]:
    """Count each case once, then time all of them in turns; the counted step is the one that warms up.

    Args:
        cases: Cases to measure.
        gemm: Matrix product, whose speed is also measured in each round.
        rounds: Measurements of each case.
        tick: Called with the name of the next measurement: each case once, and the product and each case once a round.
        keep: Given what is known after each round, so that an interruption loses little.
    """
    for case in cases:
        tick(case.name)
        case.count()
    turns: dict[str, Callable[[], float]] = {_PEAK: gemm.rate} | {case.name: case.seconds for case in cases}

    def found(values: dict[str, list[float]]) -> list[Measured]:
        results = []
        for case in cases:
            one = Measured(case.name, case.label, case.problem)
            if not case.problem:
                one.trained, one.saved, one.flops, one.peak = case.trained, case.saved, case.flops, case.peak
                one.seconds, one.rates = list(values[case.name]), list(values[_PEAK])
            results.append(one)
        return results

    return found(costs.in_turns(turns, rounds, tick, warm_up=False, after_round=lambda values: keep(found(values))))


def available(
    names: Sequence[str], case: Callable[[str], Case], label: Callable[[str], str]
) -> tuple[list[Case], list[Measured]]:
    """Return the methods that can be measured, and why the others cannot."""
    cases, missing = [], []
    for name in names:
        try:
            cases.append(case(name))
        except UnavailableError as reason:
            missing.append(Measured(name, label(name), str(reason)))
    return cases, missing


def ticks(cases: int, rounds: int) -> int:
    """Return the number of `measure`'s calls of ``tick``."""
    return cases + rounds * (cases + 1)
