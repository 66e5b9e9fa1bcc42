"""Small saved adapters that the tests of updates, merging and low-rank conversion share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from randlora_pl.adapters import OFT, AdapterFile, DoRA, HiRA, LoRA, LoRAXS, PiSSA, RandLoRA, read_adapter
from randlora_pl.adapters.save_load import copy_adapter
from randlora_pl.tasks import Objective
from tests.tasks.small import METHODS, built, shake

MORE: dict[str, Callable[[], Any]] = METHODS | {
    "pissa": lambda: PiSSA(rank=2),
    "loraxs": lambda: LoRAXS(rank=4, qkv="split"),
    "split": lambda: LoRA(rank=2, alpha=8, qkv="split"),
    "randlora-a": lambda: RandLoRA(rank=8, variant="a"),
    "randlora-hadamard": lambda: RandLoRA(rank=8, basis="hadamard"),
    "hira": lambda: HiRA(rank=2),
    "oft": lambda: OFT(block=8),
    "dora-randlora": lambda: DoRA(RandLoRA(rank=8)),
}


def saved(path: Path, kind: str = "text head", method: str = "randlora", **options: Any) -> Objective:
    """A task that is not at its start, and its adapter."""
    task = built(kind, **({"adapter": MORE[method]()} | options))
    shake(task, 0.02)
    task.save(path, {"step": 3})
    return task.eval()  # type: ignore[return-value]


def rounded(path: Path, output: Path) -> AdapterFile:
    """The adapter in bfloat16, as another folder or file."""
    copy_adapter(path, output, torch.bfloat16)
    return read_adapter(output)
