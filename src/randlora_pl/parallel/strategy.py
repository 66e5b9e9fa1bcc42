"""DistributedDataParallel for a model of which little trains: only that little is exchanged, and it is counted."""

import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from randlora_pl.adapters.kept import base_buffers
from randlora_pl.parallel.exchange import Exchange, counted_mean, share
from randlora_pl.parallel.launch import launched, store_of
from randlora_pl.utils.errors import UserError

TIMEOUT = 600.0
"""Seconds that a process waits for the others before it takes them for lost."""


class AdapterDDP(DDPStrategy):
    """Lightning's DDP, without what an adapter does not need.

    Every parameter that trains gets a gradient in the last micro-batch of a window, so that unused ones need not
    be looked for. Graphs are not static: earlier micro-batches leave the text tower out, and the last window may
    have fewer of them. Frozen weights and bases are made by every process for itself, from the same files and
    seeds; so is what trains, and a checksum of it all takes the place of the broadcast at the start. Running statistics
    of layers that train are those of process 0 after each optimizer step, so that every process evaluates and saves
    the same model.

    Args:
        timeout: Seconds that a process waits for the others.

    Attributes:
        exchange: What was exchanged so far.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        options: dict[str, Any] = {"find_unused_parameters": False, "gradient_as_bucket_view": True}
        if "init_sync" in inspect.signature(DistributedDataParallel).parameters:
            options["init_sync"] = False
        super().__init__(timeout=timedelta(seconds=timeout), **options)
        self.exchange = Exchange()
        self._statistics: list[Tensor] | None = None

    def setup_distributed(self) -> None:
        """Finds the other processes, also after torchrun has restarted them.

        torchrun keeps one store for all attempts (seen in PyTorch 2.13): gloo would find the addresses of the
        processes that have ended in it, and give up.
        """
        job = launched()
        if job is not None and job.attempt > 0 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                self._get_process_group_backend(),
                store=store_of(job),
                rank=job.rank,
                world_size=job.world,
                timeout=self._timeout,
                device_id=self.root_device if self.root_device.type != "cpu" else None,
            )
        super().setup_distributed()

    def configure_ddp(self) -> None:
        """Compares what the processes start from, then wraps the model.

        Raises:
            UserError: They do not start from the same weights.
        """
        fingerprint: Callable[[], str] = self.lightning_module.fingerprint  # type: ignore[union-attr, assignment]
        theirs: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(theirs, fingerprint())
        differ = [str(rank) for rank, other in enumerate(theirs) if other != theirs[0]]
        if differ:
            raise UserError(
                f"process {', '.join(differ)} of {self.world_size} starts from other weights than process 0: compare "
                "the weights files, checkpoints and versions of the machines (randlora-pl doctor)."
            )
        self._statistics = None
        super().configure_ddp()

    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self.exchange, counted_mean)

    def figures(self) -> dict[str, Any]:
        """What ``results.json`` says of it."""
        return self.exchange.figures()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """One optimizer step, of which the exchange is a part; then the statistics of process 0 for all."""
        self.exchange.steps += 1
        result = super().optimizer_step(*args, **kwargs)
        if self._statistics is None:
            self._statistics = list(base_buffers(self.lightning_module.model, training=True).values())  # type: ignore[union-attr, arg-type]
        share(self._statistics)
        return result
