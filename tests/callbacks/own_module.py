"""A LightningModule as a user writes it, with an adapter inside; also one rank of a process group.

Usage: ``python -m tests.callbacks.own_module FOLDER KIND`` with the variables of torchrun. Trains, resumes from the
checkpoint of the first epoch and writes ``FOLDER/RANK.pt``: the weights of both, and the names in the checkpoint.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from randlora_pl.adapters import AdaLoRA, Adapter, LoRA, RandLoRA, inject
from randlora_pl.adapters.layers import unsharded
from randlora_pl.callbacks import AdapterCheckpoint

METHODS: dict[str, Adapter] = {
    "randlora": RandLoRA(rank=4, memory="low"),
    "lora": LoRA(rank=2),
    "adalora": AdaLoRA(rank=4, target_rank=2, every=1, dropout=0.0),
}


def encoder(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))


class OwnModule(lightning.LightningModule):
    def __init__(self, method: str = "randlora", seed: int = 0, shards: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = encoder(seed)
        self.report = inject(self.model, METHODS[method])
        torch.seed()  # a head has other values in each process that builds it
        self.head, self.accuracy, self.shards = nn.Linear(64, 3), MulticlassAccuracy(3), shards
        self.register_buffer("seen", torch.zeros(()))

    def configure_model(self) -> None:
        if self.shards and not any(hasattr(parameter, "to_local") for parameter in self.parameters()):
            from torch.distributed.fsdp import fully_shard

            for part in (self.model, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        self.seen += len(images)
        loss = F.cross_entropy(self.head(self.model(images)), labels)
        penalty = None if self.report.procedure is None else self.report.procedure.penalty()
        return loss if penalty is None else loss + penalty

    def on_train_start(self) -> None:
        if self.report.procedure is not None:
            self.report.procedure.start(self.model)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        if self.report.procedure is not None:
            self.report.procedure.after_step(self.trainer.global_step, 24)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self.accuracy(self.head(self.model(batch[0])), batch[1])
        self.log("test/acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=1e-2)


def loader() -> DataLoader[Any]:
    drawn = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 64, generator=drawn), torch.randint(3, (64,), generator=drawn)
    return DataLoader(TensorDataset(*rows), batch_size=8)


def trainer(folder: Path, *callbacks: lightning.Callback, epochs: int = 3, **options: Any) -> lightning.Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saved = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1)
    own = [AdapterCheckpoint(model_attribute="model"), saved, *callbacks]
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_epochs": epochs}
    return lightning.Trainer(**{**quiet, **place, "callbacks": own, **options})


def weights(module: nn.Module) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: unsharded(value).detach().clone() for name, value in tensors}


def main(folder: Path, kind: str) -> None:
    """Train and resume as one of two ranks; the ends are written."""
    rank = int(os.environ["RANK"])

    def strategy() -> Any:
        if kind == "ddp":
            return "ddp"
        return ModelParallelStrategy(2, 1, save_distributed_checkpoint=kind == "fsdp2 sharded")

    first, again = (OwnModule(shards=kind != "ddp") for _ in range(2))
    started = trainer(folder / "first", devices=2, strategy=strategy())
    started.fit(first, loader())
    trainer(folder / "again", devices=2, strategy=strategy()).fit(
        again, loader(), ckpt_path=str(folder / "first" / "epoch=0.ckpt")
    )
    try:
        other = OwnModule(seed=1, shards=kind != "ddp")
        trainer(folder / "other", devices=2, strategy=strategy()).fit(
            other, loader(), ckpt_path=str(folder / "first" / "epoch=0.ckpt")
        )
        refused = ""
    except Exception as error:
        refused = str(error)
    ends: dict[str, Any] = {"first": weights(first), "again": weights(again), "refused": refused}
    torch.save(ends, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
