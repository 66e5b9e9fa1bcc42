"""The command in a process of its own, forked from one that has imported everything: a second instead of six."""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.faults.faults import Fault

PATIENCE = 120.0
"""Seconds after which a process is taken to hang."""
_HEAVY = ["randlora_pl.commands.fit", "randlora_pl.run.stages", "torch.utils.tensorboard", "matplotlib.figure"]


@dataclass(frozen=True)
class Ended:
    """How a process has ended: exit code, or the signal with a minus, and what it printed."""

    code: int
    out: str
    err: str


class Command:
    """``randlora-pl WORDS`` in the folder ``place``, beside which it leaves what it prints.

    Args:
        words: Behind ``randlora-pl``.
        place: Current directory of the process.
        faults: What goes wrong in it.
    """

    def __init__(self, words: Sequence[str], place: Path, faults: Sequence[Fault] = ()) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_HEAVY)
        self.place = place
        self.process: ForkServerProcess = context.Process(target=_main, args=(list(words), str(place), list(faults)))
        threads = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        os.environ.update(dict.fromkeys(threads, "1"))  # with the first process the server starts
        try:
            self.process.start()
        finally:
            for name, value in threads.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def send(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def wait(self) -> Ended:
        """Its end.

        Raises:
            AssertionError: It hangs; it is killed.
        """
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join()
        out, err = (file.read_text(errors="replace") for file in _printed(self.place))
        assert code is not None, f"hangs: {out}{err}"
        return Ended(code, out, err)


def run(words: Sequence[str], place: Path, *faults: Fault) -> Ended:
    """Runs a command to its end."""
    return Command(words, place, faults).wait()


def _printed(place: Path) -> tuple[Path, Path]:
    return place.with_name(f"{place.name}.out"), place.with_name(f"{place.name}.err")


def _main(words: list[str], place: str, faults: list[Fault]) -> None:
    """In the child: the entry point as the shell would call it, but for the faults."""
    os.chdir(place)
    multiprocessing.set_start_method("fork", force=True)  # as in the shell: for the workers, too
    os.setsid()  # a group of its own, so that a signal to all of it spares the tests
    for name in [name for name in os.environ if name.startswith("RANDLORA_PL_")]:
        del os.environ[name]
    for stream, file in zip((sys.stdout, sys.stderr), _printed(Path(place)), strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    sys.argv = ["randlora-pl", *words]
    import torch

    from randlora_pl.commands.main import main

    torch.set_num_threads(1)
    for fault in faults:
        fault.install()
    code = main()
    atexit._run_exitfuncs()
    sys.exit(code)
