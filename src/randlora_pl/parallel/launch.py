"""How this process was started: alone, by torchrun, by SLURM's srun, or by Lightning for one more device."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from randlora_pl.utils.errors import UserError

_PATIENCE = timedelta(minutes=10)
_MOMENT = timedelta(seconds=3)
_asked: Counter[str] = Counter()
_stores: list[Any] = []  # kept open: the process group shares the server of the first process


@dataclass(frozen=True)
class Launch:
    """A job whose processes were started from outside.

    Attributes:
        rank: Number of this process in the job.
        world: Processes of the job.
        nodes: Machines.
        per_node: Processes of a machine; each has one device.
        attempt: How often torchrun has restarted them.
    """

    rank: int
    world: int
    nodes: int
    per_node: int
    attempt: int = 0


def launched() -> Launch | None:
    """The job that this process belongs to; None where the command was typed, or Lightning starts the others.

    Raises:
        UserError: The machines have different numbers of processes, which Lightning cannot do.
    """
    found = os.environ
    if "TORCHELASTIC_RUN_ID" in found:  # first: torchrun can run inside SLURM
        rank, world, per_node = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        nodes = int(found.get("GROUP_WORLD_SIZE", world // per_node))
        job = Launch(rank, world, nodes, per_node, int(found.get("TORCHELASTIC_RESTART_COUNT", "0")))
    elif "SLURM_STEP_ID" in found and found.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # inside srun
        world, nodes = int(found["SLURM_NTASKS"]), int(found.get("SLURM_NNODES", "1"))
        job = Launch(int(found.get("SLURM_PROCID", "0")), world, nodes, max(1, world // nodes))
    else:
        return None
    if job.nodes * job.per_node != job.world:
        raise UserError(f"{job.world} processes on {job.nodes} machines: start as many on each, one for each device.")
    return job if job.world > 1 else None


def process_rank() -> int:
    """Number of this process among those that would say the same, as far as the environment tells."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def agree(what: str, decide: Callable[[], str]) -> str:
    """What the first process decides; the others are told. Alone it is just decided.

    Args:
        what: Name of the question; all processes ask the same ones in the same order.
        decide: Asked of the first process only, because it may look at files that it is about to write.

    Raises:
        UserError: The first process raised it.
    """
    job = launched()
    if job is None:
        return decide()
    _asked[what] += 1
    store, key = store_of(job), f"answer/{what}/{_asked[what]}"
    if job.rank == 0:
        try:
            answer = decide()
        except UserError as error:
            store.set(key, json.dumps({"error": error.args}))
            raise
        store.set(key, json.dumps({"answer": answer}))
        return answer
    found: dict[str, Any] = json.loads(store.get(key))
    if "error" in found:
        raise UserError(*found["error"])
    return str(found["answer"])


def said_by_the_first(message: str) -> bool:
    """Whether another process of the job has a mistake to report that the first one reports too.

    The first process leaves the message in the store, and stays a moment so that the others find it there.

    Args:
        message: What this process has to say; the first one has said it.
    """
    rank = process_rank()
    try:
        job = launched()
    except UserError:
        return False
    if job is None:
        if rank:  # Lightning's first process ends the others
            time.sleep(_MOMENT.total_seconds())
        return False
    key = "mistake"
    try:
        store = store_of(job, _MOMENT)
        if rank == 0:
            store.set(key, message)
            time.sleep(_MOMENT.total_seconds())
            return False
        store.wait([key], _MOMENT)
        return bool(store.get(key).decode() == message)
    except RuntimeError:  # nobody there, or nothing left in time
        return False


def store_of(job: Launch, timeout: timedelta = _PATIENCE) -> Any:
    """The store through which the processes find each other; torchrun keeps it, or else the first process.

    Args:
        job: The job; each attempt has its own keys.
        timeout: How long to wait for the others.
    """
    if _stores:
        return _stores[0]
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        cluster = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    store, _, _ = next(rendezvous("env://", job.rank, job.world, timeout=timeout))
    _stores.append(PrefixStore(f"randlora-pl-{job.attempt}", store))
    return _stores[0]
