"""Trains and evaluates with sharded blocks as one rank of a process group, or alone without; see `test_sharding.py`.

Usage: ``python -m tests.run.parallel.sharding_worker FOLDER`` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT in the environment, or `main` in a test. Writes ``FOLDER/WORLD-RANK.pt``: what each run ended with.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from randlora_pl.adapters import Adapter, BitFit, HydraLoRA, LoRA, RandLoRA, adapted_layers
from randlora_pl.adapters.layers import unsharded
from randlora_pl.data import ImageData
from randlora_pl.run.parallel.strategy import AdapterFSDP
from randlora_pl.tasks import AdaptationModule, Objective, make_trainer
from randlora_pl.utils.errors import UserError
from tests.tasks.small import make, trained, two_blocks

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
DATA: dict[str, Any] = {
    "dataset": "digits", "shots": 3, "epochs": 1, "min_batches_per_epoch": 1,
    "batch_size": 4 // WORLD, "eval_batch_size": 50 // WORLD,
}  # fmt: skip
ACCUMULATE = 2
RUNS: dict[str, tuple[str, Adapter, dict[str, Any]]] = {
    "dense": ("vision-language", RandLoRA(rank=8, memory="fast"), {}),
    "lora": ("vision-language", LoRA(rank=2, alpha=8), {"gradient_checkpointing": True}),
    "hadamard": ("linear head", RandLoRA(rank=8, basis="hadamard", qkv="split"), {}),
    "bitfit": ("text head", BitFit(), {}),
    "hydralora": ("text head", HydraLoRA(rank=2, alpha=8), {}),
}


class Look(L.Callback):
    """What happens in a run: shards, gathered and reduced bytes, and full-size weights between the two passes."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.facts: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not isinstance(trainer.strategy, AdapterFSDP):
            return
        assert trainer.strategy.shards is not None
        self.facts |= {"shards": vars(trainer.strategy.shards), "sharded": sharded_bytes(pl_module.objective.model)}
        assert not trainer.test_loop.inference_mode and not trainer.validate_loop.inference_mode

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        shapes = {layer.base_weight.shape for layer in adapted_layers(pl_module.objective.model).values()}
        saved: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.shape in shapes:
                saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        self.saved = saved
        self.hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.hooks.__exit__()
        self.facts["kept"] = max(self.facts.get("kept", 0), sum(storage.nbytes() for storage in self.saved.values()))
        self.saved.clear()

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy, AdapterFSDP):
            self.facts |= trainer.strategy.metrics()
            self.facts["sharded at the end"] = sharded_bytes(pl_module.objective.model)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen += batch["index"][batch["weight"] > 0].tolist()


def sharded_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of all sharded weights, and of this rank's part."""
    weights: list[Any] = [p for p in model.parameters() if hasattr(p, "to_local")]
    return sum(w.numel() * 4 for w in weights), sum(w.to_local().numel() * 4 for w in weights)


def trainer(*callbacks: L.Callback, accumulate: int = ACCUMULATE, **options: Any) -> L.Trainer:
    plain = {"limit_val_batches": 0, "strategy": AdapterFSDP() if WORLD > 1 else "auto", "accelerator": "cpu"}
    own = {"devices": WORLD, "accumulate_grad_batches": accumulate, "callbacks": [*callbacks]}
    return make_trainer(**(plain | own | options))


def with_sgd(task: Objective) -> AdaptationModule:
    """Steps of SGD, which do not blow up rounding errors of small gradients as Adam's do."""
    module = AdaptationModule(task)
    module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[assignment, method-assign]
        [p for p in task.parameters() if p.requires_grad], lr=0.1
    )
    module.on_train_start = lambda: None  # type: ignore[method-assign]  # no learning rates to take
    return module


class Gathers:
    """Counts the bytes that FSDP2 gathers, by the collective that its versions use."""

    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

    def __enter__(self) -> "Gathers":
        self.bytes, self.plain = 0, getattr(dist, self.name)
        setattr(dist, self.name, self.call)
        return self

    def call(self, output_tensor: Tensor, *args: Any, **options: Any) -> Any:
        self.bytes += output_tensor.numel() * output_tensor.element_size()
        return self.plain(output_tensor, *args, **options)

    def __exit__(self, *_: Any) -> None:
        setattr(dist, self.name, self.plain)


def gathered(task: Objective) -> dict[str, Tensor]:
    """Copies of what does not train, unsharded."""
    return {name: unsharded(p.detach()).clone() for name, p in task.named_parameters() if not p.requires_grad}


def run(kind: str, adapter: Adapter, options: dict[str, Any], within: bool = False) -> dict[str, Any]:
    """Zero-shot test, training and validation, as ``fit`` does: weights, figures, and what `Look` saw.

    Args:
        kind: Of task.
        adapter: The method.
        options: Of the task.
        within: Whether to validate after each micro-batch, so also while text features wait for a backward pass.
    """
    task, look, data = make(kind, adapter=adapter, **options), Look(), ImageData(**DATA)
    module = with_sgd(task)
    own = trainer(look, limit_test_batches=2, **({"val_check_interval": 1, "limit_val_batches": 1} if within else {}))
    (figures,) = own.test(module, data, verbose=False)
    before, look.seen = gathered(task), []
    with Gathers() as gathers:
        own.fit(module, data)
    within_fit = {f"{key} in the training": float(value) for key, value in own.callback_metrics.items() if "val" in key}
    look.seen = []
    (validated,) = trainer(look, limit_val_batches=1.0).validate(module, data, verbose=False)
    return {
        "weights": trained(task), "figures": figures | within_fit | validated, "seen": look.seen,
        "steps": own.global_step, "gathered": gathers.bytes,
        "frozen": before, "restored": equal(before, gathered(task)), **look.facts,
    }  # fmt: skip


def equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def half() -> dict[str, Any]:
    """A run under bf16-mixed, whose frozen matrices are cast by the gathers, or before by one process alone."""
    options = {"frozen_dtype": "bfloat16"} if WORLD == 1 else {}
    task = make("linear head", adapter=RandLoRA(rank=8), **options)
    with Gathers() as gathers:
        trainer(precision="bf16-mixed").fit(with_sgd(task), ImageData(**DATA))
    inside = [p for name, p in task.named_parameters() if ".resblocks." in name and not p.requires_grad and p.dim() > 1]
    kinds = {p.dtype for name, p in task.named_parameters() if ".resblocks." in name}
    return {
        "weights": trained(task), "gathered": gathers.bytes, "matrices": sum(p.numel() for p in inside), "kinds": kinds,
    }  # fmt: skip


class SaveAt(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:  # two optimizer steps of two micro-batches
            trainer.save_checkpoint(self.path)


def resumed(folder: Path) -> dict[str, Any]:
    """A run that was resumed in the middle ends as the whole one; its adapter is kept for a process alone."""
    path = folder / f"middle-{WORLD}.ckpt"
    whole_run, broken = (make("vision-language", adapter=RandLoRA(rank=16, dropout=0.2)) for _ in range(2))
    trainer(SaveAt(path)).fit(AdaptationModule(whole_run), ImageData(**DATA))
    trainer().fit(AdaptationModule(broken), ImageData(**DATA), ckpt_path=path, weights_only=True)
    if RANK == 0:
        broken.save(folder / f"adapter-{WORLD}")
    (figures,) = trainer(limit_val_batches=1.0).validate(AdaptationModule(broken), ImageData(**DATA), verbose=False)
    return {"same": equal(trained(whole_run), trained(broken)), "figures": dict(figures)}


def spoilt() -> dict[str, Any]:
    """What is said of an update that is not finite, and whether the weights are as before."""
    task = make("text head", adapter=LoRA(rank=2))
    trainer(limit_test_batches=1).test(AdaptationModule(task), ImageData(**DATA), verbose=False)
    before = gathered(task)
    *_, last = (parameter for parameter in task.parameters() if parameter.requires_grad)
    with torch.no_grad():
        last.fill_(torch.inf)
    return {"said": complaint(task), "restored": equal(before, gathered(task))}


def complaint(task: Objective) -> str:
    try:
        trainer(limit_test_batches=1).test(AdaptationModule(task), ImageData(**DATA), verbose=False)
    except UserError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {name: run(*which, within=name == "dense") for name, which in RUNS.items()}
    results |= {"resumed": resumed(folder), "spoilt": spoilt(), "half": half()}
    torch.save(results, folder / f"{WORLD}-{RANK}.pt")


if __name__ == "__main__":
    with two_blocks():
        main(Path(sys.argv[1]))
