"""Memory of a training step: tensors kept for the backward pass, allocator, resident set."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

OUT_OF_MEMORY = "out of memory"


class Saved:
    """Bytes of the storages that autograd keeps, each counted once.

    Args:
        outside: Tensors that exist anyway and so cost nothing: parameters, buffers, the batch.
    """

    def __init__(self, outside: Iterable[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        """Count the whole storage of a tensor: a view keeps all of it alive."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


@contextmanager
def saved_tensors(outside: Iterable[Tensor]) -> Iterator[Saved]:
    """Count what forward passes inside the block keep for their backward passes.

    An address stands for a storage, which is right until the first backward pass: up to then nothing that
    was counted is freed.
    """
    saved = Saved(outside)
    with saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved


def max_rss() -> int:
    """Return the largest resident set of this process in bytes, 0 if the system does not report it."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):  # getrusage would give the parent's value where that is larger
                return int(line.split()[1]) * 1024
    from randlora_pl.run.callbacks.cost import peak_bytes  # with Lightning, whose size is not a method's

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
            return pool.submit(_rss_after, work, arguments).result()
        except Exception:  # of any library; also a broken pool
            return None


def _rss_after(work: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    work(*arguments)
    return max_rss()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error is the answer of an allocator without memory; PyTorch has a class for GPUs only."""
    text = str(error)
    parts = (OUT_OF_MEMORY, "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(part in text for part in parts))


def reset_peak(device: torch.device) -> None:
    """Start `peak` anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Return the most that PyTorch's allocator had handed out on a GPU since `reset_peak`; None on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
