"""Devices and strategy of a run: the launcher's, `AdapterDDP`, or FSDP2 for a backbone larger than one device.

FSDP2 shards frozen blocks and replicates trainable parameters.
"""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.fsdp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.models.execution import repeated_blocks
from randlora_pl.run.parallel.launch import launched
from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.tasks.module import own_module
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import byte_size


@dataclass(frozen=True)
class Shards:
    """Sharded weights of a model: number of blocks, bytes of their frozen weights, and bytes kept on this device."""

    blocks: int
    bytes: int
    device_bytes: int

    def __str__(self) -> str:
        """Return one line for the run summary."""
        here = f"{byte_size(self.device_bytes)} of {byte_size(self.bytes)}"
        return f"frozen weights of {self.blocks} blocks: {here} on each device"


class AdapterFSDP(AdapterDDP):
    """`AdapterDDP` for a backbone larger than one device.

    FSDP2 shards each block's frozen weights: it gathers them before the block runs, forward and backward, and frees
    them afterwards. The rest of the model (embeddings, projections, heads, bases) and all trainable parameters are
    replicated; FSDP2 ignores them, and DistributedDataParallel exchanges their gradients as without sharding. Shards
    are not saved: checkpoints and adapters are identical to `AdapterDDP`'s.

    Attributes:
        exchange: Gradients exchanged so far; gathered weights are not counted.
        shards: Sharded weights, after the model is built.
    """

    shards: Shards | None = None

    def setup(self, trainer: Trainer) -> None:
        """Shard the model at the first run, and wrap it for training.

        Raises:
            UserError: See `model_to_device`.
        """
        # A tensor that FSDP2 creates in inference mode cannot be used in later training.
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            loop.inference_mode = False
        trainer.predict_loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move and shard one block at a time, then move the rest: the whole model never has to fit the device.

        Raises:
            UserError: The task, ``--model.torch_compile`` or the method does not fit; see also `shard`.
        """
        task = own_module(self.lightning_module).objective
        if task.runs_blocks:
            raise UserError(
                f"--trainer.strategy fsdp2 does not fit {type(task).__name__}, which calls the blocks of its model. "
                "Remove the option for ddp: each device then holds the whole model."
            )
        if task.torch_compile:
            raise UserError(
                "--trainer.strategy fsdp2 and --model.torch_compile exclude each other, because compiled blocks keep "
                "matrices of full size for the backward pass. Remove one of them."
            )
        if any(each.holds_factors for each in task.adapter.leaves()):
            raise UserError(
                f"{task.adapter.method()} holds singular vectors of all weights on each device, so sharding would save "
                "nothing. Use --trainer.strategy ddp, or a method with small factors, such as LoRAXS or RandLoRA."
            )
        if not any(hasattr(p, "to_local") for p in task.model.parameters()):  # else sharded by an earlier run
            world: Any = torch.distributed.group.WORLD  # it has the timeout
            dtype = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
            shard(task.model, DeviceMesh.from_group(world, self.root_device.type), dtype)
        weights = [p for p in task.model.parameters() if hasattr(p, "to_local")]
        local = sum(weight.to_local().nbytes for weight in weights)
        self.shards = Shards(len(repeated_blocks(task.model)), sum(weight.nbytes for weight in weights), local)
        super().model_to_device()

    def metrics(self) -> dict[str, Any]:
        """Return the entries for ``results.json``: exchange and shards."""
        shards = {f"sharded/{name}": value for name, value in vars(self.shards).items()} if self.shards else {}
        return super().metrics() | shards

    def teardown(self) -> None:
        """Keep the model on the device: shards do not belong on the host, and the next run needs them here."""
        if isinstance(self.model, DistributedDataParallel):
            self.model = self.lightning_module
        assert self.cluster_environment is not None and self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()


def shard(model: nn.Module, mesh: Any, dtype: torch.dtype | None = None) -> None:
    """Shard the frozen weights of a backbone's blocks in place, on a one-dimensional `DeviceMesh`.

    Args:
        model: Backbone.
        mesh: Processes.
        dtype: Dtype of autocast's products. Matrices are gathered in it, as products would cast them; frozen norms and
            biases then stay whole on each device, in their own dtype.

    Raises:
        UserError: There is nothing to shard, or PyTorch is too old.
    """
    library: Any = torch.distributed.fsdp
    fully_shard = getattr(library, "fully_shard", None)
    if fully_shard is None or "ignored_params" not in inspect.signature(fully_shard).parameters:
        raise UserError(
            f"--trainer.strategy fsdp2 needs PyTorch 2.7 or newer, this is {torch.__version__}: "
            "pip install --upgrade torch torchvision, or remove the option."
        )
    blocks = repeated_blocks(model)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    whole = trained
    if dtype is not None:
        whole = trained | {parameter for parameter in model.parameters() if parameter.dim() < 2}
        options["mp_policy"] = library.MixedPrecisionPolicy(param_dtype=dtype, cast_forward_inputs=False)
    frozen = {parameter for block in blocks.values() for parameter in block.parameters()} - trained
    if not frozen:
        why = "all of its weights train" if blocks else "it has no repeated blocks"
        raise UserError(
            f"--trainer.strategy fsdp2 finds no frozen block to shard in {type(model).__name__}: {why}. "
            "Remove --trainer.strategy; each device then holds the whole model."
        )
    for module in model.modules():
        if isinstance(module, DeltaWeight):
            module.keep = False  # keeping full-size weights for the backward pass would undo the sharding
    for block in blocks.values():
        fully_shard(block, **options, ignored_params=whole)
    sharded = {parameter for block in blocks.values() for parameter in block.parameters()} - whole
    # The root manages no weights, but prefetches: the next block is gathered while one computes.
    fully_shard(model, **options, ignored_params=set(model.parameters()) - sharded)
    for name in ("encode_image", "encode_text"):  # of open_clip, beside ``forward``
        if callable(getattr(model, name, None)):
            library.register_fsdp_forward_method(model, name)


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
    there = torch.cuda.is_available() or (asked == "gpu" and torch.backends.mps.is_available())
    if asked in ("gpu", "cuda") and not there:
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
        UserError: The strategy is Lightning's FSDP, or ``fsdp2`` cannot be started here.
    """
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
    asked |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    chosen = Trainer(**asked).strategy
    # Notebooks fork their processes and keep Lightning's strategy.
    plain = type(chosen) is DDPStrategy and chosen._start_method == "popen"
    if plain:
        return config | {"strategy": AdapterFSDP(timeout) if named == SHARDED else AdapterDDP(timeout)}
    if named != SHARDED:
        return config
    if isinstance(chosen, SingleDeviceStrategy):
        _log.warning(f"--trainer.strategy {SHARDED}: there is one device, so nothing is sharded.")
        return config | {"strategy": "auto"}
    raise UserError(
        f"--trainer.strategy {SHARDED} cannot be started here ({type(chosen).__name__}). Start the command in a "
        "terminal or with torchrun, on several GPUs or with --trainer.accelerator cpu --trainer.devices 2."
    )
