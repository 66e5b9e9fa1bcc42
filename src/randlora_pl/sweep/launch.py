"""Starts several processes on one sweep: on this machine, or as a SLURM array through submitit."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError, first_line
from randlora_pl.utils.machine import usable_cores

PARENT = "RANDLORA_PL_SWEEP_PARENT"
"""Environment variable of the processes that `local` starts."""

_PATIENCE = 60.0
"""Seconds that processes get to end their step after SIGTERM."""


def local(words: Sequence[str], folder: Path, jobs: int, look: Callable[[], None], every: float = 1.0) -> list[int]:
    """Run the same command in several processes until all have ended; their output goes to ``FOLDER/logs``.

    Now and then it calls ``look``.

    Returns:
        Their exit codes.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM, once all have ended.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []

    try:
        for number in range(jobs):
            with (logs / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{number + 1}.log").open("ab") as log:
                command = [sys.executable, "-m", "randlora_pl", *words]
                env = _environment(number, jobs) | {PARENT: "stdin"}
                started.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.PIPE, env=env))
        while running := [process for process in started if process.poll() is None]:
            look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0].wait(every)
        look()
    finally:
        _end(started)
    return [process.returncode for process in started]


def end_with_parent() -> None:
    """End a process that `local` started as SIGTERM does when its parent is gone, even if the parent was killed.

    Its standard input is a pipe without data: it closes with the process that holds the other end.
    """
    if os.environ.pop(PARENT, None) is None:  # popped: processes that this one starts have another input
        return

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)
        os._exit(1)  # its locks then belong to a dead owner

    threading.Thread(target=wait, name="sweep-parent", daemon=True).start()


def _environment(number: int, jobs: int) -> dict[str, str]:
    """Return the environment of one process: its part of the cores, and one GPU where there are several."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = list(Path("/proc/driver/nvidia/gpus").glob("*"))  # without starting CUDA here
    gpus = visible.split(",") if visible else list(map(str, range(len(devices))))
    return environment | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if len(gpus) > 1 else {})


def _end(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    running = [process for process in started if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + _PATIENCE
    for process in running:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def slurm(
    run: Callable[[list[str]], int], words: Sequence[str], folder: Path, jobs: int, options: Sequence[str]
) -> list[str]:
    """Submit an array of jobs that work on one sweep.

    Args:
        run: Runs a command in a job; of a module, so that the job can import it.
        words: The command behind ``randlora-pl`` that each of them runs.
        folder: The sweep, on a disk that all machines see; submitit keeps its files in ``FOLDER/slurm``.
        jobs: Number of jobs.
        options: ``key=value`` words for submitit's ``update_parameters``, such as ``slurm_partition=gpu``,
            ``timeout_min=600`` and ``gpus_per_node=1``; ``cluster=local`` and ``cluster=debug`` run them here.

    Returns:
        Numbers of the jobs.

    Raises:
        UserError: submitit is not installed, an option is wrong, or SLURM is missing.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--launcher slurm needs submitit: pip install '.[slurm]' in the checkout") from error
    parameters = dict(map(_option, options))
    cluster = str(parameters.pop("cluster", "slurm"))
    try:
        executor = submitit.AutoExecutor(folder=str(folder / "slurm"), cluster=cluster)
        executor.update_parameters(**{"name": f"sweep-{folder.name}"} | parameters)
        submitted = executor.map_array(run, [list(words)] * jobs)
        if cluster == "debug":
            for job in submitted:
                job.result()
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError, OSError,
            subprocess.SubprocessError) as error:  # fmt: skip
        raise UserError(f"--launcher slurm: {first_line(error)}") from error
    return [str(job.job_id) for job in submitted]


def _option(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise UserError(f"--slurm {word}: expected KEY=VALUE, such as slurm_partition=gpu.")
    return key, int(value) if value.isdecimal() else value
