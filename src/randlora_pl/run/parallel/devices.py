"""Trainer options that follow from how the processes were started."""

import logging
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from randlora_pl.run.parallel.launch import launched
from randlora_pl.utils.errors import UserError

SHARDED = "fsdp2"
"""Name of `AdapterFSDP` in ``--trainer.strategy``."""
_log = logging.getLogger("randlora_pl")


def with_devices(config: dict[str, Any]) -> dict[str, Any]:
    """Return trainer options with the devices and machines of torchrun or SLURM, unless the user set them.

    Raises:
        UserError: A GPU is requested but not available, or the user set other numbers than the launcher: every process
            would train on its own.
    """
    asked = config.get("accelerator")
    if asked in ("gpu", "cuda") and not (
        torch.cuda.is_available() or (asked == "gpu" and torch.backends.mps.is_available())
    ):
        raise UserError(
            f"--trainer.accelerator is {asked}, but PyTorch finds no GPU. Remove the option, or run: randlora-pl doctor"
        )
    job = launched()
    if job is None:
        return config
    config = dict(config)
    for option, automatic, value in (("devices", "auto", job.per_node), ("num_nodes", 1, job.nodes)):
        given = config.get(option)
        counted = len(given) if isinstance(given, list) else given
        if given in (None, automatic):
            config[option] = value
        elif str(counted) != str(value):
            raise UserError(
                f"--trainer.{option} is {given}, but {job.per_node} processes were started on each of {job.nodes} "
                "machines. Remove the option, or start a matching number of processes."
            )
    return config


def with_strategy(config: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Return trainer options with `AdapterDDP` where Lightning would choose its DDP, or `AdapterFSDP` for ``fsdp2``.

    Any other strategy set by the user is kept. A process waits ``timeout`` seconds for the others.

    Raises:
        UserError: The timeout is not positive, the strategy is Lightning's FSDP, or ``fsdp2`` cannot be started here.
    """
    if not timeout > 0:
        raise UserError(f"--run.timeout is {timeout:g}: give a positive number of seconds.")
    named = config.get("strategy")
    if isinstance(named, FSDPStrategy) or (isinstance(named, str) and named != SHARDED and "fsdp" in named.lower()):
        what = named if isinstance(named, str) else type(named).__name__
        raise UserError(
            f"--trainer.strategy {what} does not fit a frozen model with adapters. Use --trainer.strategy {SHARDED}, "
            "which shards the frozen weights and replicates trainable parameters."
        )
    if named not in (None, "auto", SHARDED):
        return config
    asked = {name: config[name] for name in ("accelerator", "devices", "num_nodes") if config.get(name) is not None}
    chosen = Trainer(
        **asked, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    ).strategy
    # Notebooks fork their processes and keep Lightning's strategy.
    plain = type(chosen) is DDPStrategy and chosen._start_method == "popen"
    if named != SHARDED:
        if not plain:
            return config
        from randlora_pl.run.parallel.strategy import AdapterDDP

        return config | {"strategy": AdapterDDP(timeout)}
    if plain:
        from randlora_pl.run.parallel.sharding import AdapterFSDP

        return config | {"strategy": AdapterFSDP(timeout)}
    if isinstance(chosen, SingleDeviceStrategy):
        _log.warning(f"--trainer.strategy {SHARDED}: there is one device, so nothing is sharded.")
        return config | {"strategy": "auto"}
    raise UserError(
        f"--trainer.strategy {SHARDED} cannot be started here ({type(chosen).__name__}). Start the command in a "
        "terminal or with torchrun, on several GPUs or with --trainer.accelerator cpu --trainer.devices 2."
    )
