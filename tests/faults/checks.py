"""What must be true of a run folder at any moment, and when two runs are the same."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image

from randlora_pl.adapters import read_adapter
from randlora_pl.run.callbacks.checkpoint import check_checkpoint
from randlora_pl.run.options.saved_config import check_run, without_head
from tests.faults.child import run
from tests.faults.faults import hidden
from tests.support.cli import SMALL

TINY = [
    *("fit", *SMALL, "--data.steps", "8", "--data.batch_size", "4", "--trainer.accumulate_grad_batches", "2"),
    *("--data.eval_batch_size", "16", "--trainer.limit_val_batches", "2", "--trainer.val_check_interval", "4"),
    *("--trainer.log_every_n_steps", "2"),
]
FIT = [*TINY, "--checkpoint.every_n_steps", "3", "--model.adapter.dropout", "0.1"]
"""8 steps of two micro-batches, a validation after every second step, checkpoints also after steps 3 and 6."""
STEPS = 8
_OF_THE_MOMENT = {
    *("fit_seconds", "images_per_second", "peak_memory_bytes", "checkpoint_bytes"),
    *("git_commit", "git_changed", "command"),
}


def run_of(place: Path) -> Path:
    """The newest run in a place; those without a config were killed before anything could be resumed."""
    return max((place / "runs" / "quickstart").glob("2*"), key=lambda folder: folder.name)


def resume(place: Path) -> list[str]:
    """The command that goes on with the run of a place, or begins it."""
    begun = list(place.glob("runs/*/*")) and (run_of(place) / "config.yaml").is_file()
    return ["fit", "--resume", str(run_of(place).relative_to(place))] if begun else FIT


def finish(place: Path, undisturbed: Path, *words: str) -> None:
    """Resumes a run to its end, and compares it with the undisturbed one."""
    ended = run([*resume(place), *words], place)
    assert ended.code == 0, ended.err
    assert_whole(run_of(place))
    assert hidden(run_of(place)) == []
    assert_same(run_of(place), undisturbed)


def assert_whole(folder: Path) -> None:
    """Every file under its final name is complete; logs, to which lines are added, are not looked at."""
    for file in (file for file in folder.rglob("[!.]*") if file.is_file() and file.parent.name != "tensorboard"):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        if file.suffix == ".ckpt":
            check_checkpoint(file)
            assert torch.load(file, weights_only=True)["global_step"] > 0
        elif file.suffix == ".json":
            assert json.loads(file.read_text())
        elif file.name.startswith("config.yaml"):
            assert check_run(folder)
            assert {"model", "data", "trainer", "run"} <= yaml.safe_load(file.read_text()).keys()
        elif file.name == "ranks.yaml":
            assert yaml.safe_load(file.read_text())
        elif file.suffix == ".png":
            Image.open(file).load()
        elif file.suffix == ".csv":
            assert file.read_text().endswith("\n")
            assert len({len(row) for row in csv.reader(file.open(newline=""))}) == 1
        else:
            assert file.name in ("adapter.safetensors", "run.log"), file
    for adapter in (folder / name for name in ("adapter", "adapter-best")):
        if adapter.exists():
            file = read_adapter(adapter)
            assert file.tensors or file.extra


def step_of(folder: Path) -> int:
    """Step of the last checkpoint; 0 without one."""
    file = folder / "checkpoints" / "last.ckpt"
    return int(torch.load(file, weights_only=True)["global_step"]) if file.is_file() else 0


def assert_same(folder: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """Two finished runs have the same bits: adapters, optimizer, figures (``but`` for some), config, and files."""
    for name in ("adapter", "adapter-best"):
        for file in ("adapter.safetensors", "adapter_config.json"):
            assert (folder / name / file).read_bytes() == (other / name / file).read_bytes(), (name, file)
    ours, theirs = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (folder, other))
    for key in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "ImageData"):
        assert equal(ours[key], theirs[key]), key
    assert equal(ours.get("procedure"), theirs.get("procedure"))
    assert equal(*(checkpoint["callbacks"]["RunCheckpoint"] for checkpoint in (ours, theirs)))
    figures = [json.loads((run / "results.json").read_text()) for run in (folder, other)]
    assert figures[0].keys() ^ figures[1].keys() <= set(but)
    for key in figures[0].keys() - _OF_THE_MOMENT - {*but}:
        assert figures[0][key] == figures[1][key], key
    configs = [without_head((run / "config.yaml").read_text()) for run in (folder, other)]
    assert configs[0] == configs[1]
    assert names(folder) == names(other)


def names(folder: Path) -> list[str]:
    """Paths in a run folder.

    Left out are event files, of which each process has its own, and configs that were replaced, as that of a run is
    which is killed before the model has given the last values.
    """
    paths = (path for path in folder.rglob("*") if not re.search(r"tfevents|config\.yaml\.\d", path.name))
    return sorted(str(path.relative_to(folder)) for path in paths)


def equal(a: Any, b: Any) -> bool:
    """Whether two nested values are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
