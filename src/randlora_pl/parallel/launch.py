"""Detection of the launcher: none, torchrun, SLURM's srun, or Lightning starting one more process."""

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from randlora_pl.utils.errors import UserError

TIMEOUT = 600.0
"""Seconds to wait for other processes before the run fails."""

_asked: Counter[str] = Counter()
_stores: list[Any] = []  # kept open: the process group shares the server of rank 0


@dataclass(frozen=True)
class Launch:
    """Job whose processes were started by a launcher.

    Attributes:
        rank: Global rank of this process.
        world: Number of processes.
        nodes: Number of machines.
        per_node: Processes per machine, one device each.
        attempt: Number of restarts by torchrun.
    """

    rank: int
    world: int
    nodes: int
    per_node: int
    attempt: int = 0


def launched() -> Launch | None:
    """Return the job of this process, or None if the user or Lightning started it.

    Raises:
        UserError: The machines have different numbers of processes, which Lightning does not support.
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
        raise UserError(
            f"{job.world} processes on {job.nodes} machines: start the same number on each, one per device."
        )
    return job if job.world > 1 else None


def process_rank() -> int:
    """Return the rank of this process among processes that report the same errors, from environment variables."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def broadcast_decision(what: str, decide: Callable[[], str]) -> str:
    """Return rank 0's decision in every process; without a job, just call ``decide``.

    Args:
        what: Name of the decision; all processes request the same decisions in the same order.
        decide: Called on rank 0 only, because it may check files that rank 0 is about to write.

    Raises:
        UserError: Rank 0 raised it.
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
            with suppress(RuntimeError):  # this process may host the store, so that it must not end before the others
                store.wait([f"{key}/{rank}" for rank in range(1, job.world)], timedelta(seconds=10))
            raise
        store.set(key, json.dumps({"answer": answer}))
        return answer
    found: dict[str, Any] = json.loads(store.get(key))
    store.set(f"{key}/{job.rank}", "read")
    if "error" in found:
        raise UserError(*found["error"])
    return str(found["answer"])


def decide_first(what: str, variable: str, decide: Callable[[], str]) -> str:
    """Return rank 0's decision, also in the processes that Lightning starts after it for further devices.

    Args:
        what: See `broadcast_decision`, also for errors.
        variable: Environment variable by which these processes get it.
        decide: Called on rank 0 only.
    """
    given = os.environ.get(variable)
    if given and launched() is None and int(os.environ.get("LOCAL_RANK", "0")):  # a launcher's may be an old one
        return given

    def remembered() -> str:
        os.environ[variable] = answer = decide()
        return answer

    return broadcast_decision(what, remembered)


def store_of(job: Launch) -> Any:
    """Return the store for rendezvous; torchrun or rank 0 hosts it. Each attempt of a job has its own keys."""
    if _stores:
        return _stores[0]
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        cluster = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    store, _, _ = next(rendezvous("env://", job.rank, job.world, timeout=timedelta(seconds=TIMEOUT)))
    _stores.append(PrefixStore(f"randlora-pl-{job.attempt}", store))
    return _stores[0]
