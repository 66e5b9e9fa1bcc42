"""Trains and tests as one rank of a process group, or alone; started by ``test_ddp.py``.

Usage: ``python -m tests.language.ddp_worker TOY TOKENIZER FOLDER`` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT in the environment. Writes ``FOLDER/WORLD-RANK.pt``.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from randlora_pl.parallel.strategy import AdapterDDP
from randlora_pl.tasks import make_trainer

from .small import make, texts, trained

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))


def main(toy: Path, tokenizer: Path, folder: Path) -> None:
    """31 samples of 12 a window: the last window is shorter, and one of its shares is padding."""
    torch.set_num_threads(1)

    def trainer(**more: Any) -> L.Trainer:
        strategy = AdapterDDP() if WORLD > 1 else "auto"
        return make_trainer(devices=WORLD, strategy=strategy, accelerator="cpu", **more)

    task = make(tokenizer, max_new_tokens=2)
    data = texts(toy, steps=None, epochs=1, batch_size=6 // WORLD, eval_batch_size=4, mask_prompt=False)
    trainer(accumulate_grad_batches=2, limit_val_batches=0).fit(task, data)
    (figures,) = trainer().test(task, data, verbose=False)
    (loss,) = trainer().validate(task, data, verbose=False)
    torch.save({"weights": trained(task), "figures": figures | loss}, folder / f"{WORLD}-{RANK}.pt")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
