"""Jobs of two processes on this machine, started as torchrun and srun start them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.cli import SMALL

FIT = ["fit", *SMALL, "--run.logger", "none"]
LONG = [*FIT, "--data.steps", "30", "--data.batch_size", "4", "--checkpoint.every_n_steps", "3", "--resume", "auto"]
PATIENCE = 240


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def environment(folder: Path, **more: str) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RANDLORA_PL_", "SLURM_"))}
    return ours | {"OMP_NUM_THREADS": "1", "RANDLORA_PL_CACHE": str(folder / "cache")} | more


def spawn(command: list[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env=environment(folder, **more), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def torchrun(words: list[str], folder: Path, *options: str) -> subprocess.Popen[str]:
    """One agent; its workers run ``randlora-pl WORDS``."""
    return spawn([sys.executable, "-m", "torch.distributed.run", *options, "-m", "randlora_pl", *words], folder)


def two_agents(words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Two machines of one process each, the first of which the others know by its address."""
    common = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", f"{free_port()}")
    return [torchrun(words, folder, *common, "--node-rank", rank) for rank in "01"]


def srun(words: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    """Two tasks of a SLURM step on one machine."""
    return spawn_tasks([words, words], folder)


def spawn_tasks(words: list[list[str]], folder: Path, port: int = 0) -> list[subprocess.Popen[str]]:
    """Two tasks of a SLURM step on one machine, each with words of its own."""
    step = {
        "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port or free_port()}",
    }  # fmt: skip
    command = [sys.executable, "-m", "randlora_pl"]
    return [
        spawn([*command, *own], folder, **step | {"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{rank}"})
        for rank, own in enumerate(words)
    ]


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Ends what is left of the jobs, with all their children."""
    try:
        yield
    finally:
        for process in processes:
            try:
                os.killpg(process.pid, 9)
            except ProcessLookupError:
                continue
            process.communicate()


def outputs(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and output of each."""
    with ended(*processes):
        texts = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


def worker(agent: subprocess.Popen[str], rank: int) -> int:
    """Process id of an agent's worker."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == agent.pid and f"RANK={rank}".encode() in words:
            return int(entry.name)
    raise LookupError(f"no worker {rank}")


def wait_for_checkpoint(folder: Path, *processes: subprocess.Popen[str]) -> Path:
    """The run folder, as soon as it holds a checkpoint."""
    deadline = time.monotonic() + PATIENCE
    while not (found := list(folder.glob("runs/*/2*/checkpoints/last.ckpt"))):
        assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
        time.sleep(0.01)
    return found[0].parents[1]
