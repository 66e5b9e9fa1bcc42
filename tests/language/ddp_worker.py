"""Trains and tests as one rank of a process group, or alone; started by ``test_ddp.py``.

Usage: ``python -m tests.language.ddp_worker FOLDER TOKENIZER KIND=DATA...`` with RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT in the environment. KIND is one of `KINDS`. Writes ``FOLDER/WORLD-RANK.pt``, and what was
written to ``FOLDER/WORLD/answers.jsonl``.
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
from randlora_pl.tasks import AdaptationModule, make_trainer

from . import classify
from .small import make, texts, trained

WORLD, RANK = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0")))


def toy(folder: str, tokenizer: str, **options: Any) -> tuple[Any, Any, int]:
    """31 samples of 12 a step: the last step is shorter, and one of its shares is padding."""
    given = {"steps": None, "epochs": 1, "batch_size": 6 // WORLD, "eval_batch_size": 4, "mask_prompt": False} | options
    return make(tokenizer, max_new_tokens=2), texts(folder, **given), 2


def packed(folder: str, tokenizer: str) -> tuple[Any, Any, int]:
    """Rows of one to four samples."""
    return toy(folder, tokenizer, packing=True, cutoff=40, epochs=2)


def e2e(folder: str, _: str) -> tuple[Any, Any, int]:
    task = make("bytes", "gpt2", overrides={"vocab_size": 260, "tie_word_embeddings": False})
    # Random weights write no words; what is tested is how texts come together, not what they are.
    task.write_answers = lambda _, items: [f" It {item.references[0][6:]}" for item in items]  # type: ignore[method-assign]
    options: dict[str, Any] = {"cutoff": 512, "steps": 2, "batch_size": 6 // WORLD, "eval_batch_size": 2}
    return task, TextData(dataset="e2e", root=folder, **options), 2


def classes(folder: str, _: str, **options: Any) -> tuple[Any, Any, int]:
    """41 test samples, or 9, in evaluation windows of 4: the last one has one sample, so that a rank only pads."""
    data = classify.labelled(folder, steps=6, batch_size=10 // WORLD, eval_batch_size=4 // WORLD, **options)
    return classify.make(learning_rate=3e-3), data, 1


def scores(folder: str, _: str) -> tuple[Any, Any, int]:
    return classes(folder, _, dataset="jsonl", scores=True)


KINDS = {"toy": toy, "packed": packed, "e2e": e2e, "classes": classes, "scores": scores}


def main(folder: Path, tokenizer: str, *sources: str) -> None:
    torch.set_num_threads(1)
    generation.meteor = lambda *_: (None, "not here")  # type: ignore[assignment]  # reads its tables for many seconds

    def trainer(**more: Any) -> L.Trainer:
        strategy = AdapterDDP() if WORLD > 1 else "auto"
        place = folder / str(WORLD)
        return make_trainer(devices=WORLD, strategy=strategy, accelerator="cpu", default_root_dir=place, **more)

    found = {}
    for kind, _, source in (each.partition("=") for each in sources):
        task, data, parts = KINDS[kind](source, tokenizer)
        trainer(accumulate_grad_batches=parts, limit_val_batches=0).fit(AdaptationModule(task), data)
        (figures,) = trainer(callbacks=[WrittenAnswers()]).test(AdaptationModule(task), data, verbose=False)
        if kind in ("toy", "e2e"):
            figures = figures | trainer().validate(AdaptationModule(task), data, verbose=False)[0]
        found[kind] = {"weights": trained(task), "figures": figures}
    torch.save(found, folder / f"{WORLD}-{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
