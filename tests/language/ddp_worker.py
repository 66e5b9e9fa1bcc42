"""Trains and tests as one rank of a process group, or alone; started by ``test_ddp.py``.

Usage: ``python -m tests.language.ddp_worker KIND DATA TOKENIZER FOLDER`` with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT in the environment. KIND is ``toy`` or ``e2e``. Writes ``FOLDER/WORLD-RANK.pt``, and what was written to
``FOLDER/WORLD/answers.jsonl``.
"""

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

from randlora_pl.language import metrics as generation
from randlora_pl.language.data import TextData
from randlora_pl.run.callbacks import WrittenAnswers
from randlora_pl.run.parallel.strategy import AdapterDDP
from randlora_pl.tasks import make_trainer

from .small import make, texts, trained

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))


def main(kind: str, data_folder: Path, tokenizer: Path, folder: Path) -> None:
    """31 samples of 12 a step: the last step is shorter, and one of its shares is padding."""
    torch.set_num_threads(1)
    generation.meteor = lambda *_: (None, "not here")  # type: ignore[assignment]  # reads its tables for many seconds

    def trainer(**more: Any) -> L.Trainer:
        strategy = AdapterDDP() if WORLD > 1 else "auto"
        place = folder / str(WORLD)
        return make_trainer(devices=WORLD, strategy=strategy, accelerator="cpu", default_root_dir=place, **more)

    if kind == "toy":
        task = make(tokenizer, max_new_tokens=2)
        data = texts(data_folder, steps=None, epochs=1, batch_size=6 // WORLD, eval_batch_size=4, mask_prompt=False)
    else:
        shape = {"vocab_size": 260, "tie_word_embeddings": False}
        task = make("bytes", "gpt2", overrides=shape)
        # Random weights write no words; what is tested is how texts come together, not what they are.
        task.answers = lambda _, items: [f" It {item.references[0][6:]}" for item in items]  # type: ignore[method-assign]
        data = TextData(
            dataset="e2e", root=str(data_folder), cutoff=512, steps=2, batch_size=6 // WORLD, eval_batch_size=2
        )
    trainer(accumulate_grad_batches=2, limit_val_batches=0).fit(task, data)
    (figures,) = trainer(callbacks=[WrittenAnswers()]).test(task, data, verbose=False)
    (loss,) = trainer().validate(task, data, verbose=False)
    torch.save({"weights": trained(task), "figures": figures | loss}, folder / f"{WORLD}-{RANK}.pt")


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
