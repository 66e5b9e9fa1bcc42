"""Costs of a training step: seconds, operations, tensors kept for the backward pass, allocator, resident set.

Timings are taken in turns, with their spread: machines are noisy, and what runs beside slows all cases alike.
"""

import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from randlora_pl.utils.machine import usable_cores

OUT_OF_MEMORY = "out of memory"


@contextmanager
def saved_tensors(outside: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Count what forward passes inside the block keep for their backward passes: the bytes of each storage, once.

    An address stands for a storage, which is right until the first backward pass: up to then nothing that
    was counted is freed.

    Args:
        outside: Tensors that exist anyway and so cost nothing: parameters, buffers, the batch.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in outside}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # a view keeps all of it alive
        if storage.data_ptr() not in seen:
            sizes.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def max_rss() -> int:
    """Return the largest resident set of this process in bytes, 0 if the system does not report it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):  # getrusage would give the parent's value where that is larger
                return int(line.split()[1]) * 1024
    from randlora_pl.run.callbacks.progress import peak_bytes  # with Lightning, whose size is not a method's

    return peak_bytes(torch.device("cpu"))


def rss_elsewhere(work: Callable[..., Any], *arguments: Any) -> int | None:
    """Return the largest resident set of a new process that does some work; None if it was killed, or failed.

    The reason of a failure appears when the same work is done in this process.

    Args:
        work: A function of a module, so that it can be sent.
        arguments: Arguments of the function.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            pool.submit(work, *arguments).result()
            return pool.submit(max_rss).result()
        except Exception:  # of any library; also a broken pool
            return None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error is the answer of an allocator without memory; PyTorch has a class for GPUs only."""
    text = str(error)
    parts = (OUT_OF_MEMORY, "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(part in text for part in parts))


_LEAST = 0.2  # seconds that the products of one measurement take at least


def counter() -> FlopCounterMode:
    """Count the products of matrices, convolutions and attention inside a ``with`` block, backward passes included.

    Operations are counted as they reach the device, so that operations of custom autograd functions are in;
    element by element ones are not.
    """
    aten = torch.ops.aten

    def added(_: torch.Size, left: torch.Size, right: torch.Size, *__: Any, **___: Any) -> int:
        return 2 * math.prod(left) * right[-1]

    # the sizes are (batch, heads, length, width)
    def scores(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])  # and their product with the values

    def backward(_: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any) -> int:
        # the scores once more, then two products for the weights and the values and two for query and key
        return 2 * math.prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])

    omitted = {  # by PyTorch: fused attention on CPUs, and in-place added products
        aten.addmm_: added,
        aten.baddbmm_: added,
        aten._scaled_dot_product_flash_attention_for_cpu: scores,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=omitted)


class Gemm:
    """A product of two large square matrices, whose speed stands for the peak of the machine.

    Args:
        side: Rows and columns, by default as many as the device likes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, side: int | None = None) -> None:
        self.side = side or (8192 if device.type == "cuda" else 2048)
        self.device, self.dtype = device, dtype

    def rate(self) -> float:
        """Return the operations per second, the mean over a fifth of a second or longer."""
        matrix = torch.randn(self.side, self.side, device=self.device).to(self.dtype)  # gone before anything else runs
        result = torch.mm(matrix, matrix)
        synchronize(self.device)
        start, count = time.perf_counter(), 0
        while not count or time.perf_counter() - start < _LEAST:
            torch.mm(matrix, matrix, out=result)
            synchronize(self.device)
            count += 1
        return 2 * self.side**3 * count / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> "Spread":
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
    after_round: Callable[[dict[str, list[float]]], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Return the measurements of each case, one per round; every round goes through all cases.

    Every other round goes backwards, so that no case always follows the same one, which leaves it caches and an
    allocator in its own state.

    Args:
        cases: Functions to measure, by name; each call returns one value.
        rounds: Measurements of each case.
        tick: Called with the name of the case that is measured next.
        warm_up: Whether a round that does not count comes first.
        after_round: Given the measurements so far after each round that counts.
    """
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(-1 if warm_up else 0, rounds):
        order = list(cases)
        for name in order[::-1] if number > 0 and number % 2 else order:
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
    return Spread.over([one / other for one, other in zip(values, base, strict=True)])


def machine() -> dict[str, Any]:
    """Return facts that affect timings: processor, cores this process may use, and versions."""
    facts: dict[str, Any] = {"processor": processor(), "cores": usable_cores(), "threads": torch.get_num_threads()}
    facts["torch"] = torch.__version__
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {"python": platform.python_version()}


def processor() -> str:
    """Return the processor's name, as far as the system reports it."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (read line by line)
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
