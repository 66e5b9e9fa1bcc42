"""Numbered batches and their loader for Lightning.

Batch ``m`` is a pure function of ``m``, so that any number of workers gives the same batches, and a resumed run
continues with batch ``m`` without reading earlier ones.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator, MutableMapping
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from randlora_pl.utils.errors import UserError

Batch = dict[str, Any]

log = logging.getLogger("randlora_pl")


class Batches(Protocol):
    """Numbered batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...


class _Guarded(Dataset[Batch]):
    """Dataset that returns errors as values: a worker process would hide the message in a traceback."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> Batch:
        try:
            return self.batches[number]
        except UserError as error:
            return {"error": error}


def _ignore_sigterm_from_others(worker: int) -> None:
    """Ignore SIGTERM in workers unless the main process sends it.

    Batch systems send it to all processes of a job, but training needs the workers to finish its step.
    """
    training = parent_process()
    if training is None or not hasattr(signal, "sigwaitinfo"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def listen(sender: int | None) -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
            pass
        os._exit(0)

    threading.Thread(target=listen, args=(training.pid,), daemon=True).start()


def _stop_workers(inner: DataLoader[Batch]) -> None:
    if inner._iterator is not None:
        inner._iterator._shutdown_workers()  # type: ignore[attr-defined]
        inner._iterator = None


class Loader:
    """Data loader of numbered batches for Lightning.

    Its length is the whole run's, also if it starts later, because Lightning itself counts the batches before a resume.
    It is not a `DataLoader`, so that Lightning does not replace it.

    Args:
        batches: Numbered batches.
        start: Number of the first batch.
        num_workers: Worker processes; 0 loads in this process.
        skipped: Receives the name of each skipped image, with the reason.
    """

    def __init__(
        self, batches: Batches, start: int = 0, num_workers: int = 0, skipped: MutableMapping[str, str] | None = None
    ) -> None:
        self.batches = batches
        self.start = start
        self.skipped: MutableMapping[str, str] = {} if skipped is None else skipped
        self._inner: DataLoader[Batch] = DataLoader(
            _Guarded(batches),
            batch_size=None,
            sampler=range(start, len(batches)),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_sigterm_from_others,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),  # otherwise it would use the global generator
        )
        # where the garbage collector frees a cycle with the iterator in it, it closes the workers' queues first, and
        # PyTorch waits 5 s for each worker; this keeps the queues open until the workers have stopped
        Finalize(self, _stop_workers, (self._inner,))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._inner:
            if "error" in batch:
                _stop_workers(self._inner)  # the traceback may keep them alive
                raise batch["error"]
            for name, reason in batch.pop("bad", ()):
                if name not in self.skipped:
                    self.skipped[name] = reason
                    log.warning("skipped the unreadable image %s (%d so far)", name, len(self.skipped))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return no state: the trainer's step suffices. Its presence makes the loader resumable for Lightning."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load nothing."""

    @property
    def _iterator(self) -> Any:
        """Inner iterator; Lightning shuts down its workers by this name."""
        return self._inner._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._inner._iterator = value
