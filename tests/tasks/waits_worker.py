"""Counts what makes the host wait for the device in micro-batches 5 to 8 of trainings through the command line.

Usage: ``python -m tests.tasks.waits_worker FOLDER``, see ``test_waits.py``. Prints the counts of each training as JSON.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from randlora_pl.adapters.random_bases import Distribution, draw, drawn_on
from randlora_pl.commands.main import main
from randlora_pl.run import lightning_cli
from randlora_pl.utils.device import choose_as_on_cuda
from tests.language.classify import SHAPE, write_reviews
from tests.language.small import SHAPES, write_toy
from tests.support import far_device
from tests.support.cli import SMALL

from .small import two_blocks

QUIET = (
    *("--trainer.limit_val_batches", "0", "--trainer.limit_test_batches", "0", "--data.steps", "9"),
    *("--model.learning_rate", "1e-3", "--trainer.enable_progress_bar", "true"),
)
IMAGES = (*SMALL[:-2], *QUIET)
ACCUMULATED = (*IMAGES, "--trainer.accumulate_grad_batches", "2", "--data.steps", "5")
PRUNED = (
    *(*ACCUMULATED, "--model.adapter", "AdaLoRA", "--model.adapter.rank", "4", "--model.adapter.warmup", "0"),
    *("--model.adapter.every", "1", "--model.adapter.final", "0.4"),  # the fourth step has fixed ranks
)
RANDOM = ("--model.pretrained", "random", "--model.adapter", "RandLoRA", "--model.adapter.rank", "8")
HEAD = ("--model.name", "tiny", *RANDOM, "--data.dataset", "digits", "--data.batch_size", "8", *QUIET)


def trainings(folder: Path) -> dict[str, list[str]]:
    """The words of each training."""
    (folder / "toy").mkdir()
    text, reviews = write_toy(folder / "toy"), write_reviews(folder / "reviews")
    layer = {"num_hidden_layers": 1}
    decoder, encoder = json.dumps(SHAPES["qwen2"] | {"vocab_size": 300} | layer), json.dumps(SHAPE | layer)
    return {
        "joint": [*IMAGES],
        "accumulated": [*ACCUMULATED],
        "local": [*IMAGES, "--model.loss_batch", "local"],
        "pruned": [*PRUNED],
        "head": ["--model", "LinearHeadTask", *HEAD],
        "prompts": [  # of both stages: the second begins with the sixth of nine steps
            *("--model", "PromptTask", *HEAD, "--model.loss_batch", "joint", "--model.classifier_steps", "0.4"),
        ],
        "prompts of images": ["--model", "PromptTask", *HEAD, "--model.prompts", "CoCoOp"],
        "cache": ["--config", "tiny_clip", "--config", "tip_adapter", "--model.pretrained", "random", *QUIET],
        "decoder": [
            *("--model", "CausalLMTask", "--model.name", "qwen2", *RANDOM, "--model.config_overrides", decoder),
            *("--data.dataset", "jsonl", "--data.root", str(text), "--data.batch_size", "4", *QUIET),
        ],
        "encoder": [
            *("--model", "TextClassificationTask", "--model.name", "roberta", *RANDOM, "--data.dataset", "csv"),
            *("--model.config_overrides", encoder, "--data.root", str(reviews), "--data.batch_size", "8", *QUIET),
        ],
    }


class Window(L.Callback):
    """Counts from the end of the fourth micro-batch to the end of the eighth."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert pl_module.device.type == far_device.NAME
        far_device.WAITS.on = 3 <= batch_idx < 7


def on_the_device(config: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The trainer's options for the device, in place of `with_strategy`."""
    device = torch.device(far_device.NAME, 0)
    strategy = SingleDeviceStrategy(device, accelerator=far_device.FarAccelerator())
    return config | {"accelerator": "auto", "strategy": strategy, "devices": 1, "callbacks": [Window()]}


def count(words: list[str]) -> dict[str, int]:
    """Train, and return what waits, with the number of each."""
    far_device.WAITS.seen.clear()
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = main(["fit", *words])
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    assert code == 0, told.getvalue()[-3000:]
    return dict(far_device.WAITS.seen)


if __name__ == "__main__":
    torch.set_num_threads(1)
    far_device.use()
    drawn = [draw(3, "B", 2, 5, 7, Distribution("normal"), torch.device("cpu"))]
    with drawn_on(torch.device(far_device.NAME, 0)):
        drawn.append(draw(3, "B", 2, 5, 7, Distribution("normal"), torch.device("cpu")))
    assert torch.equal(*drawn) and drawn[1].device.type == "cpu"
    lightning_cli.with_strategy = on_the_device  # type: ignore[assignment]
    root = Path(sys.argv[1])
    with two_blocks(), choose_as_on_cuda():
        names = sys.argv[2:]
        found = {name: count(words) for name, words in trainings(root).items() if not names or name in names}
    print(json.dumps(found, indent=1))
