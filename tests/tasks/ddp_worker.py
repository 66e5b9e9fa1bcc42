"""Trains and evaluates as one rank of a process group, or alone; started by ``test_ddp.py``.

Usage: ``python -m tests.tasks.ddp_worker FOLDER JOB ...`` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT in the environment, or `main` in a test. Writes ``FOLDER/WORLD-RANK.pt``: what each job ended with.
"""

import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from open_clip.loss import SigLipLoss

from randlora_pl.adapters import AutoLoRA, Fira, FullFineTuning, LoRA, RandLoRA, Together
from randlora_pl.data import ImageData
from randlora_pl.run.callbacks import Figures, PerClass
from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.tasks import AdaptationModule, LinearHeadTask, VisionLanguageTask
from randlora_pl.tasks.images import normalize
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.reuse import caching

from .prompt.learners import make_prompts
from .small import make, sigmoid_clip, trained, two_blocks

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
# 30 samples of 8 a step: the last step has 6, so that the last micro-batch of rank 1 is all padding.
DATA: dict[str, Any] = {
    "dataset": "digits", "shots": 3, "epochs": 1, "min_batches_per_epoch": 1,
    "batch_size": 4 // WORLD, "eval_batch_size": 50 // WORLD,
}  # fmt: skip
RUNS = {
    "captions": ("vision-language", "randlora"),
    "images": ("text head", "dora"),
    "head": ("linear head", "together"),
    "pruned": ("linear head", "adalora"),  # at the second and the fourth step
}
PROMPTS = ("maple + dept", "promptsrc + randlora", "two stages", "cocoop", "tip")
ACCUMULATE = 2


class Look(L.Callback):
    """What the process group does: samples that were evaluated, tensors that are sent, gradients after each batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.sent: list[str] | None = None
        self.exchanged: list[int] = []
        self.exchange: dict[str, Any] = {}
        self.logged: list[tuple[float, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if isinstance(trainer.strategy, AdapterDDP):
            assert not trainer.strategy._ddp_kwargs["find_unused_parameters"]
            ignored = trainer.strategy.model.parameters_to_ignore  # type: ignore[union-attr]
            states = [*pl_module.named_parameters(), *pl_module.named_buffers()]
            self.sent = [name.removeprefix("objective.") for name, _ in states if name not in ignored]
            assert not trainer.strategy.model.modules_buffers  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(trainer.strategy, AdapterDDP):
            self.exchanged.append(trainer.strategy.exchange["bytes"])
            self.exchange = trainer.strategy.metrics()
        if batch["micro_batch"] == batch["micro_batches"] - 1:
            self.logged.append(tuple(trainer.callback_metrics[f"train/{name}"].item() for name in ("loss", "acc")))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen += batch["index"][batch["weight"] > 0].tolist()


class SaveAt(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:  # two optimizer steps of two micro-batches
            trainer.save_checkpoint(self.path)


def trainer(*callbacks: L.Callback, validate: bool = False, accumulate: int = ACCUMULATE) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", devices=WORLD, strategy=AdapterDDP() if WORLD > 1 else "auto", max_epochs=1, logger=False,
        accumulate_grad_batches=accumulate, callbacks=list(callbacks), use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=1.0 if validate else 0,
    )  # fmt: skip


def task_of(kind: str, method: str) -> Any:
    """The task of one of `RUNS`."""
    if method == "together":
        return make(kind, adapter=Together([LoRA(rank=2, alpha=8), RandLoRA(rank=8)], rates=[2, 1]))
    return make(kind, method)


def run(kind: str, method: str) -> dict[str, Any]:
    """Trains and validates: the weights after it, the figures, and what `Look` saw."""
    task, own, data = task_of(kind, method), trainer(look := Look()), ImageData(**DATA)
    own.fit(AdaptationModule(task), data)
    (figures,) = trainer(look, validate=True).validate(AdaptationModule(task), data, verbose=False)
    return {
        "weights": trained(task), "figures": figures, "seen": look.seen, "sent": look.sent, "steps": own.global_step,
        "logged": look.logged, "exchanged": look.exchanged, "exchange": look.exchange,
    }  # fmt: skip


def local(loss_batch: str = "local") -> dict[str, torch.Tensor]:
    """Two ranks with a loss of their own are one process with twice as many micro-batches, each for itself."""
    task = make("vision-language", "lora", loss_batch=loss_batch)
    trainer(accumulate=ACCUMULATE * 2 // WORLD).fit(AdaptationModule(task), ImageData(**DATA | {"batch_size": 2}))
    return trained(task)


class AtFirst(L.Callback):
    """Trained tensors, and Tip-Adapter's factors, before the first step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.state = {name: value.detach().clone() for name, value in pl_module.objective.trained_state().items()}


def prompted(kind: str) -> dict[str, Any]:
    """Weights before and after steps of SGD on all classes, with all terms of the loss, and what was sent."""
    plain: dict[str, Any] = {"adapter": LoRA(rank=2, alpha=8)} if kind == "two stages" else {}  # without dropout
    rates = {"prompt_learning_rate": 0.05, "learning_rate": 0.05, "max_grad_norm": None}
    task = make_prompts(kind, optimizer="sgd", **rates, **plain)
    trainer(look := Look(), start := AtFirst()).fit(AdaptationModule(task), ImageData(**DATA))
    return {"start": start.state, "weights": trained(task), "sent": look.sent}


def projected() -> dict[str, torch.Tensor]:
    """Weights after steps with GaLore's projections, of which each rank computes its own."""
    task = make("vision-language", adapter=Fira(rank=8, period=2), learning_rate=1e-3)
    trainer().fit(AdaptationModule(task), ImageData(**DATA))
    return trained(task)


def searched() -> dict[str, torch.Tensor]:
    """Weights and selection variables after a search through steps of the weights."""
    task = make("vision-language", adapter=AutoLoRA(rank=3, alpha=48, order="unrolled"), learning_rate=1e-2)
    trainer().fit(AdaptationModule(task), ImageData(**DATA))
    return trained(task) | {f"v {number}": v.clone() for number, v in enumerate(task.report.procedure.vectors)}


def unequal() -> str:
    """What is said where the ranks start from other weights."""
    task = make("vision-language", seed=RANK)
    try:
        trainer().fit(AdaptationModule(task), ImageData(**DATA | {"shots": 1}))
    except UserError as error:
        return str(error)
    return ""


def different() -> str:
    """What is said where the ranks draw other images."""
    try:
        trainer().fit(AdaptationModule(make("vision-language")), ImageData(**DATA | {"seed": RANK}))
    except UserError as error:
        return str(error)
    return ""


def resumed(path: Path) -> list[dict[str, torch.Tensor]]:
    """Weights after a whole run, and after one that was resumed in the middle."""
    whole, broken = (make("vision-language", adapter=RandLoRA(rank=16, dropout=0.2)) for _ in range(2))
    trainer(SaveAt(path)).fit(AdaptationModule(whole), ImageData(**DATA))
    trainer().fit(AdaptationModule(broken), ImageData(**DATA), ckpt_path=path, weights_only=True)
    return [trained(whole), trained(broken)]


def pairs(root: Path) -> dict[str, float]:
    """Recall of untrained towers on a file of images and captions."""
    task, data = VisionLanguageTask("tiny", "random"), ImageData(dataset="pairs", root=str(root), eval_batch_size=4)
    (figures,) = trainer().test(AdaptationModule(task), data, verbose=False)
    return dict(figures)


class Keep(L.Callback):
    """Images and captions of this rank."""

    def __init__(self) -> None:
        self.images: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.images.append(batch["image"]), self.labels.append(batch["label"])


@sigmoid_clip()
def sigmoid(root: Path) -> dict[str, Any]:
    """The change of a whole SigLIP model by one step of SGD, and what open_clip's loss gives for the same pairs."""
    options: dict[str, Any] = {"name": "Small-sigmoid", "adapter": FullFineTuning(), "max_grad_norm": None}
    task, other = (make("vision-language", **options) for _ in range(2))
    module = AdaptationModule(task)
    module.configure_optimizers = lambda: torch.optim.SGD(task.parameters(), lr=1.0)  # type: ignore[assignment, method-assign]
    module.on_train_start = lambda: None  # type: ignore[method-assign]
    data = ImageData(**DATA | {"dataset": "pairs", "root": str(root), "shots": None, "sampling": "epochs"})
    trainer(keep := Keep()).fit(module, data)
    other.set_classes(data.classnames, ["{}"], captions=True)
    other.adapt()
    model: Any = other.model
    images, tokens = torch.cat(keep.images), other.caption_tokens(torch.cat(keep.labels))
    x, y = normalize(model.encode_image(images)), normalize(model.encode_text(tokens))
    loss = SigLipLoss(rank=RANK, world_size=WORLD)
    loss(x, y, model.logit_scale.exp(), model.logit_bias).backward()
    expected = {name: value.grad for name, value in other.named_parameters()}
    for value in expected.values() if WORLD > 1 else ():
        torch.distributed.all_reduce(value)  # the loss of each rank has its own images alone
    start, end = trained(other), trained(task)
    return {
        "captions": len(set(torch.cat(keep.labels).tolist())),
        "moved": {name: float(value.norm()) / WORLD for name, value in expected.items()},
        "errors": {name: float((start[name] - end[name] - value / WORLD).norm()) for name, value in expected.items()},
        "bias": float(end["backbone.logit_bias"]),
    }


def statistics() -> dict[str, Any]:
    """What a whole model with running statistics has learned, and what each rank evaluates of it."""
    task = LinearHeadTask("test_resnet.r160_in1k", "random", adapter=FullFineTuning(), img_size=32, learning_rate=1e-3)
    trainer().fit(AdaptationModule(task), data := ImageData(**DATA))
    fingerprint = task.fingerprint()
    (figures,) = trainer(validate=True).validate(AdaptationModule(task), data, verbose=False)
    moved = [name for name in task.trained_state() if name.endswith("running_mean")]
    return {"fingerprint": fingerprint, "figures": figures, "moved": moved}


def tables(folder: Path) -> dict[str, Any]:
    """What is written about the classes of the first 100 test images, and the surest mistakes."""
    own = trainer(classes := PerClass(), figures := Figures(samples=3))
    own.limit_test_batches, own._default_root_dir = 2, str(folder)
    (found,) = own.test(AdaptationModule(make("text head")), ImageData(**DATA), verbose=False)
    texts = [(folder / name).read_text() for name in ("test_per_class.csv", "figures/confusion.csv") if RANK == 0]
    surest = figures._surest.gathered()
    return {"found": found | classes.facts, "texts": texts, "surest": [mistake.index for mistake in surest.mistakes]}


def jobs(folder: Path) -> dict[str, Callable[[], Any]]:
    """What can be trained and evaluated, by name."""
    return {
        **{name: partial(run, *which) for name, which in RUNS.items()},
        **{kind: partial(prompted, kind) for kind in PROMPTS},
        "resumed": partial(resumed, folder / f"middle-{WORLD}.ckpt"),
        "local": local,
        "joint": partial(local, "joint"),
        "unequal": unequal,
        "different": different,
        "projected": projected,
        "searched": searched,
        "statistics": statistics,
        "sigmoid": partial(sigmoid, folder / "unique" / "pairs.csv"),
        "pairs": partial(pairs, folder / "pairs.csv"),
        "tables": partial(tables, folder / f"tables-{WORLD}"),
    }


def main(folder: Path, names: Iterable[str]) -> None:
    torch.set_num_threads(1)
    own = jobs(folder)
    torch.save({name: own[name]() for name in names}, folder / f"{WORLD}-{RANK}.pt")


if __name__ == "__main__":
    with two_blocks(), caching():
        main(Path(sys.argv[1]), sys.argv[2:])
