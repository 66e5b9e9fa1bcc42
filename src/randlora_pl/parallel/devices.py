"""Options of the trainer that follow from how the processes were started."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from randlora_pl.errors import UserError
from randlora_pl.parallel.launch import launched
from randlora_pl.parallel.strategy import AdapterDDP


def with_devices(config: dict[str, Any]) -> dict[str, Any]:
    """The trainer's options with devices and machines as torchrun or SLURM started them, unless they were typed.

    Args:
        config: Options of the trainer.

    Raises:
        UserError: Other numbers were typed: every process would train on its own.
    """
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
                "machines: leave it out, or start others."
            )
    return config


def with_strategy(config: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The trainer's options with `AdapterDDP` where Lightning would choose its DDP; what was named wins.

    Args:
        config: Options of the trainer.
        timeout: Seconds that a process waits for the others.

    Raises:
        UserError: It is not positive.
    """
    if not timeout > 0:
        raise UserError(f"--run.timeout is {timeout:g}: give a positive number of seconds.")
    if config.get("strategy") not in (None, "auto"):
        return config
    asked = {name: config[name] for name in ("accelerator", "devices", "num_nodes") if config.get(name) is not None}
    chosen = Trainer(
        **asked, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    ).strategy
    # notebooks fork their processes
    plain = type(chosen) is DDPStrategy and chosen._start_method == "popen"
    return config | {"strategy": AdapterDDP(timeout)} if plain else config
