"""Strategies of several processes: DistributedDataParallel for adapters, FSDP2 for a backbone too large for a device.

The processes are compared, then exchange only the few trainable parameters. FSDP2 shards frozen blocks.
"""

import inspect
import json
import signal
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from randlora_pl.adapters.base import DeltaWeight
from randlora_pl.adapters.trained import base_buffers
from randlora_pl.data.base import BLOCK, TEXTS, Part
from randlora_pl.models.execution import repeated_blocks
from randlora_pl.run import TIMEOUT
from randlora_pl.run.parallel.launch import Ask, Meeting, Options, busy_port, check_options, join, launched, meeting_of
from randlora_pl.tasks.files import checksum
from randlora_pl.tasks.module import AdaptationModule, own_module
from randlora_pl.utils.device import LateCopy
from randlora_pl.utils.errors import UserError, log
from randlora_pl.utils.text import byte_size


def compare_splits(meeting: Meeting, parts: Mapping[str, Part]) -> None:
    """Refuse processes with different samples, see `Meeting.compare`."""

    def answer(question: str) -> str:
        if not question:
            return json.dumps({name: part.digest() for name, part in parts.items()})
        name, block = json.loads(question)
        if name not in parts:
            return "[]"
        return json.dumps(parts[name].blocks() if block is None else parts[name].samples(block))

    meeting.compare("the samples", answer, _splits_differ)


def _splits_differ(ask: Ask) -> str:
    digests: list[dict[str, list[Any]]] = [json.loads(text) for text in ask("")]
    first = digests[0]
    different = ((rank, name) for rank, own in enumerate(digests) for name in {**first, **own})
    pair = next(((rank, name) for rank, name in different if first.get(name) != digests[rank].get(name)), None)
    if pair is None:
        return ""
    rank, name = pair
    counts = [own.get(name, [0])[0] for own in (first, digests[rank])]
    blocks = [json.loads(text) for text in ask(json.dumps([name, None]))]
    place = _first_difference(blocks[0], blocks[rank])
    samples = [json.loads(text) for text in ask(json.dumps([name, place]))]
    index = _first_difference(samples[0], samples[rank])
    ours, theirs = (json.loads(own[index])[1] if index < len(own) else "missing" for own in (samples[0], samples[rank]))
    theirs = "the same with another content" if ours == theirs else theirs
    files = ", and the files that --data.templates and --data.classnames name" if name in TEXTS else ""
    return (
        f"the {name} differ: process 0 has {counts[0]:,}, process {rank} has {counts[1]:,}; number "
        f"{place * BLOCK + index:,} is {ours} in process 0 and {theirs} in process {rank}. Copy the data again{files}."
    )


def _first_difference(ours: list[Any], theirs: list[Any]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


@torch.no_grad()
def share(tensors: Sequence[Tensor]) -> None:
    """Copy the tensors of rank 0 to every process, with one broadcast per dtype."""
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
        own = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in own])
        dist.broadcast(flat, 0)
        for tensor, values in zip(own, torch.split(flat, [tensor.numel() for tensor in own]), strict=True):
            tensor.copy_(values.view_as(tensor))


class AdapterDDP(DDPStrategy):
    """Lightning's DDP without the parts an adapter does not need.

    Every trainable parameter gets a gradient in the last micro-batch of an optimizer step, so unused parameters need
    not be searched for. Graphs are not static: earlier micro-batches skip the text tower, and the last optimizer step
    may have fewer micro-batches. Every process builds frozen weights, bases and trainable parameters from the same
    files and seeds; comparing one checksum replaces the broadcast at the start. Running statistics of trained layers
    are copied from rank 0 after each optimizer step, so that every process evaluates and saves the same model.

    Attributes:
        exchange: Counts of the gradients passed to the all-reduce so far: ``bytes``, ``messages``, optimizer ``steps``.
            A ring of n processes sends 2 (n - 1) / n times the bytes over each link.
        options: Options that all processes must have in common, by name.
    """

    def __init__(self, timeout: float = TIMEOUT) -> None:
        options: dict[str, Any] = {"find_unused_parameters": False, "gradient_as_bucket_view": True}
        if "init_sync" in inspect.signature(DistributedDataParallel).parameters:
            options["init_sync"] = False
        super().__init__(timeout=timedelta(seconds=timeout), **options)
        self.exchange = Counter[str]()
        self.options: Options = {}
        self._meeting: Meeting | None = None
        self._patience = timeout
        self._statistics: list[Tensor] | None = None
        self._terminated = False  # True after SIGTERM

    def setup_distributed(self) -> None:
        """Connect to the other processes, also after a restart by torchrun; compare options if Lightning started them.

        torchrun keeps one store for all attempts (seen in PyTorch 2.13): gloo would find the addresses of ended
        processes in it and fail.
        """
        job = launched()
        if job is not None:
            self._meeting = meeting_of(job, self._patience)
            self._meeting.exchanges = False
            self.barrier("connect")
        if job is not None and job.attempt > 0 and not dist.is_initialized():
            dist.init_process_group(
                self._get_process_group_backend(),
                store=meeting_of(job).store,
                rank=job.rank,
                world_size=job.world,
                timeout=self._timeout,
                device_id=self.root_device if self.root_device.type != "cpu" else None,
            )
        try:
            super().setup_distributed()
        except RuntimeError as error:
            raise busy_port(error) or error from error
        if self._meeting is None:
            store = dist.distributed_c10d._get_default_store()
            self._meeting = join(store, self.global_rank, self.world_size, self._patience)
            check_options(self._meeting, self.options)
        self._meeting.exchanges = False

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes; at the store before a run, where a mistake of one process ends all.

        Raises:
            UserError: A process has ended because of a mistake.
            LostProcessError: A process is lost.
        """
        assert self._meeting is not None
        if self._meeting.exchanges:
            super().barrier(name)
        else:
            self._meeting.compare(f"the wait {name}", str, lambda ask: "".join(ask("")))
            self._meeting.exchanges = name == "run-stage"  # Lightning's last one before the loops

    def compare(self, splits: Mapping[str, Part]) -> None:
        """Refuse processes with other samples than rank 0; each waits for all, see `Meeting.compare`."""
        assert self._meeting is not None
        compare_splits(self._meeting, splits)

    def model_to_device(self) -> None:
        """Move the model, and compare the weights of all processes before any is exchanged.

        Raises:
            UserError: Processes start from different weights; see also `Meeting.compare`.
        """
        super().model_to_device()
        if self._meeting is not None and not self.exchange["steps"]:
            module = self.lightning_module
            assert module is not None
            if isinstance(module, AdaptationModule):
                fingerprint = module.objective.fingerprint()
            else:
                fingerprint = checksum(dict(module.named_parameters()) | dict(module.named_buffers()))

            def judge(ask: Ask) -> str:
                sums = ask("")
                differ = ", ".join(str(rank) for rank, other in enumerate(sums) if other != sums[0])
                return differ and (
                    f"process {differ} of {len(sums)} has different weights from process 0. Compare the weights "
                    "files, checkpoints and versions of the machines (randlora-pl doctor)."
                )

            self._meeting.compare("the weights", lambda _: fingerprint, judge)

    def configure_ddp(self) -> None:
        """Wrap the model, and replace Lightning 2.6's broadcast of rank 0's SIGTERM before each micro-batch.

        The signal of any process ends all before the same micro-batch. Lightning copies a number to the GPU, and reads
        the received one at once: the host waits twice. Here every process reads what it received one micro-batch
        before.
        """
        self._statistics = None
        loop: Any = self.lightning_module.trainer.fit_loop.epoch_loop  # type: ignore[union-attr]
        last = LateCopy(torch.zeros(()))

        def exchange() -> None:
            nonlocal last
            if float(last.read()):
                raise SIGTERMException
            flag = torch.full((), float(self._terminated), device=self.root_device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            last = LateCopy(flag)

        loop._broadcast_sigterm_tensor = exchange
        super().configure_ddp()

    def on_train_start(self) -> None:
        """Only note SIGTERM from here on; Lightning removes the handler at the end of the run.

        Lightning's handler exchanges a tensor while the others may wait for another, and its process then ends alone.
        """
        if self.world_size > 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "_terminated", True))

    def _register_ddp_hooks(self) -> None:
        def counted_mean(exchange: Counter[str], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            gradient = bucket.buffer()
            exchange.update(bytes=gradient.nbytes, messages=1)
            return default_hooks.allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]

        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self.exchange, counted_mean)  # which averages as it does without a hook

    def metrics(self) -> dict[str, Any]:
        """Return the entries for ``results.json``, None before the first step."""
        size = messages = None
        if steps := self.exchange["steps"]:
            size, messages = round(self.exchange["bytes"] / steps), round(self.exchange["messages"] / steps, 2)
        return {"exchange/bytes_per_step": size, "exchange/messages_per_step": messages}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run one optimizer step including the exchange, then copy rank 0's statistics to all processes."""
        self.exchange["steps"] += 1
        result = super().optimizer_step(*args, **kwargs)
        if self._statistics is None:
            module = self.lightning_module
            model: Any = module.objective.model if isinstance(module, AdaptationModule) else module
            self._statistics = list(base_buffers(model, training=True).values())
        share(self._statistics)
        return result


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
        exchange: As `AdapterDDP`'s; gathered weights are not counted.
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
            UserError: The task, an option of the model or the method does not fit; see also `shard`.
        """
        task = own_module(self.lightning_module).objective
        if task.runs_blocks:
            raise UserError(
                f"--trainer.strategy fsdp2 does not fit {type(task).__name__}, which calls the blocks of its model. "
                "Remove the option for ddp: each device then holds the whole model."
            )
        if task.quantize:
            raise UserError("--trainer.strategy fsdp2 shards no quantized weights. Remove --model.quantize.")
        if task.torch_compile:
            raise UserError(
                "--trainer.strategy fsdp2 and --model.torch_compile cannot be combined, because compiled blocks keep "
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
    for name in ("encode_image", "encode_text"):  # of open_clip, besides ``forward``
        if callable(getattr(model, name, None)):
            library.register_fsdp_forward_method(model, name)


SHARDED = "fsdp2"
"""Name of `AdapterFSDP` in ``--trainer.strategy``."""


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
    if type(chosen) is DDPStrategy and chosen._start_method == "popen":  # notebooks fork, and keep Lightning's
        return config | {"strategy": AdapterFSDP(timeout) if named == SHARDED else AdapterDDP(timeout)}
    if named != SHARDED:
        return config
    if isinstance(chosen, SingleDeviceStrategy):
        log.warning(f"--trainer.strategy {SHARDED}: there is one device, so nothing is sharded.")
        return config | {"strategy": "auto"}
    raise UserError(
        f"--trainer.strategy {SHARDED} cannot be started here ({type(chosen).__name__}). Start the command in a "
        "terminal or with torchrun, on several GPUs or with --trainer.accelerator cpu --trainer.devices 2."
    )
