"""``results.json``: all metrics of a run under flat keys, with the facts needed to reproduce it."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.atomic_output import write_text
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.run_files import RESULTS
from randlora_pl.utils.version import __version__

_PACKAGES = (
    "torch", "lightning", "open_clip_torch", "timm", "torchvision", "torchmetrics", "jsonargparse", "numpy",
    "transformers", "tokenizers",
)  # fmt: skip


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of a run so far; empty if the file does not exist.

    Raises:
        UserError: The file is cut off or damaged.
    """
    file = folder / RESULTS
    try:
        return dict(parse_json(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is cut off or damaged ({error}). Delete it: fit --resume writes it again.") from error


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """Add results, JSON values by flat key, to the file of a run in one atomic write; they replace older ones."""
    text = json.dumps(read_results(folder) | results, indent=2)
    write_text(folder / RESULTS, text + "\n")
    return folder / RESULTS


def model_results(task: Any) -> dict[str, Any]:
    """Return parameter counts, identity and options of a task whose model is built.

    ``trainable_parameters`` includes a head and prompts, ``adapter_parameters`` does not. ``total_parameters`` counts
    the backbone, its adapter, head and prompts.
    """
    module: LightningModule = task
    report = task.report
    return {
        "method": report.adapter.method(),
        "trainable_parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "adapter_parameters": report.trainable,
        "total_parameters": sum(p.numel() for p in module.parameters()),
        "basis_fingerprint": report.fingerprint,
        "task": type(task).__name__,
        "base/weights_hash": report.base_hash,
        **flat("base", task.identity.as_dict()),
        **flat("adapter", report.adapter.options()),
        "learning_rate": task.learning_rate,
        **({"head_learning_rate": rate} if (rate := getattr(task, "head_learning_rate", None)) is not None else {}),
        **task.facts(),
        "seed": task.seed,
    }


def flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values under flat keys, ``prefix/name`` and ``prefix/name/inner``."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(f"{prefix}/{name}", value) if isinstance(value, dict) else {f"{prefix}/{name}": value}
    return result


def planned(data: Any) -> dict[str, Any]:
    """Return the facts about the data, with the steps limited to ``--trainer.max_steps``."""
    facts = dict(data.summary())
    limit = data.trainer.max_steps if data.trainer is not None else -1
    if 0 <= limit < facts.get("steps", 0):
        facts |= {"steps": limit, "draws": limit * facts["window"]}
    return facts


def environment() -> dict[str, Any]:
    """Return package versions, machine and git commit."""
    versions = {"version": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        **{name if name == "version" else f"version/{name}": value for name, value in versions.items()},
        "machine": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        **git_commit(Path(__file__).resolve().parent),
    }


def git_commit(folder: Path) -> dict[str, Any]:
    """Return the git commit of the package's checkout and whether it has changes; empty outside a checkout."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        tracked = _git(folder, "ls-files", "--error-unmatch", str(folder / Path(__file__).name))
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git_commit": commit, "git_changed": bool(changed)} if tracked else {}


def _git(folder: Path, *words: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10)
    return run.stdout.strip()
