"""Trains and tests a classifier as one rank of a process group, or alone; started by ``test_ddp.py``.

Usage: ``python -m tests.language.ddp_classifier TOY SCORES FOLDER`` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT in the environment. Writes ``FOLDER/WORLD-RANK.pt``.
"""

import sys
from pathlib import Path

import torch

from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.tasks import make_trainer

from .classify import labelled, make
from .ddp_worker import RANK, WORLD
from .small import trained


def main(toy: Path, scores: Path, folder: Path) -> None:
    """41 and 9 test samples in evaluation windows of 4: the last one has one sample, so that a rank only pads."""
    torch.set_num_threads(1)
    found = {}
    for name, source, options in (("classes", toy, {}), ("scores", scores, {"dataset": "jsonl", "scores": True})):
        strategy = AdapterDDP() if WORLD > 1 else "auto"
        trainer = make_trainer(devices=WORLD, strategy=strategy, accelerator="cpu", limit_val_batches=0)
        task = make(learning_rate=3e-3)
        data = labelled(source, steps=6, batch_size=10 // WORLD, eval_batch_size=4 // WORLD, **options)
        trainer.fit(task, data)
        (figures,) = trainer.test(task, data, verbose=False)
        found[name] = {"weights": trained(task), "figures": figures}
    torch.save(found, folder / f"{WORLD}-{RANK}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
