"""Run folder (Lightning's ``default_root_dir``), names of its files, the link ``latest``, and ``results.json``."""

import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.utils import __version__
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import parse_json, write_text
from randlora_pl.utils.own_classes import import_words

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: "Trainer") -> Path:
    """Return the folder with all files of this run."""
    return Path(trainer.default_root_dir)


CONFIG = "config.yaml"
LAST = "checkpoints/last.ckpt"
ADAPTER, BEST = "adapter", "adapter-best"
RESULTS = "results.json"
LATEST = "latest"
"""Name of the link to the newest run, next to the runs of one name."""


def runs_in(folder: Path) -> list[Path]:
    """Return the run folders in a folder, the newest last; the link ``latest`` is not one of them."""

    def age(run: Path) -> list[str | int]:  # TIME_10 comes after TIME_2
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", run.name)]

    runs = (file.parent for file in folder.glob(f"*/{CONFIG}"))
    return sorted((run for run in runs if run.name != LATEST and run.name[0] != "."), key=age)


def link_latest(run: Path) -> None:
    """Let ``latest`` next to a run point to it, in one step; skip it if the file system has no links.

    A file or folder of the user with that name stays as it is, and so does a link of the user to another place.
    """
    link, part = run.with_name(LATEST), run.with_name(f".{LATEST}-{os.getpid()}")
    own = link.is_symlink() and len(link.readlink().parts) == 1
    if os.path.lexists(link) and not own:
        return
    with suppress(OSError, NotImplementedError):
        part.unlink(missing_ok=True)
        part.symlink_to(run.name, target_is_directory=True)
        part.replace(link)


def unlink_latest(run: Path) -> None:
    """Let ``latest`` point to the newest remaining run if it points to a removed one; delete it without any."""
    link = run.with_name(LATEST)
    with suppress(OSError):
        if link.is_symlink() and link.readlink() == Path(run.name):
            if left := runs_in(run.parent):
                link_latest(left[-1])
            else:
                link.unlink()


def follow_latest(path: Path) -> Path:
    """Return a path with its link ``latest`` replaced by the run, so that a later run does not change the path.

    Raises:
        UserError: The link points to a run that does not exist.
    """
    link = next((part for part in (path, *path.parents) if part.name == LATEST and part.is_symlink()), None)
    if link is None:
        return path
    run = link.parent / link.readlink()
    if not run.exists():
        left = runs_in(link.parent)
        again = f"randlora-pl fit --run.name {shlex.quote(link.absolute().parent.name)}"
        mend = f"ln -sfn {shlex.quote(left[-1].name)} {shlex.quote(str(link))}" if left else again
        raise UserError(f"{link} points to {run}, which does not exist. Run: {mend}")
    return run / path.relative_to(link)


def find_run(path: str | os.PathLike[str]) -> Path:
    """Return a run folder: the path itself, the run that ``latest`` points to, or the newest run in the folder.

    A path without a run, such as an adapter file, is returned as it is.

    Raises:
        UserError: See `follow_latest`.
    """
    run = follow_latest(Path(path))
    return run if (run / CONFIG).is_file() else [run, *runs_in(run)][-1]


def resume_command(run: Path) -> str:
    """Return the command that resumes a run."""
    return f"randlora-pl fit --resume {shlex.quote(str(run))}{import_words()}"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Return `find_run` of each path; a link ``latest`` is left out if its run is also given, as by ``runs/NAME/*``."""
    runs = [find_run(path) for path in paths]
    links = [path.name == LATEST and path.is_symlink() for path in paths]
    given = {run.resolve() for run, link in zip(runs, links, strict=True) if not link}
    return [run for run, link in zip(runs, links, strict=True) if not (link and run.resolve() in given)]


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """Return an adapter: the path itself, or the tested adapter of the run that `find_run` finds there.

    The tensors' file of an adapter folder stands for the folder. A path without an adapter is returned as it is.

    Raises:
        UserError: The run has no adapter yet; see also `follow_latest`.
    """
    adapter = follow_latest(Path(path))
    if adapter.name == "adapter.safetensors" and (adapter.parent / "adapter_config.json").is_file():
        return adapter.parent
    early = adapter.name == ADAPTER and not adapter.exists()  # named before its run has written it
    run = adapter.parent if early else find_run(adapter)
    if adapter.is_file() or (adapter / "adapter_config.json").is_file() or not (run / CONFIG).is_file():
        return adapter
    if not (run / ADAPTER).is_dir():
        best = f" or use {run / BEST}" if (run / BEST).is_dir() else ""
        raise UserError(f"{run} is not finished and has no tested adapter yet. Run: {resume_command(run)}{best}")
    tested_best = results_of(run).get("tested") == BEST and (run / BEST).is_dir()
    return run / (BEST if tested_best else ADAPTER)


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


def results_of(folder: Path) -> dict[str, Any]:
    """Return the results of a run; empty if they are damaged, which a resumed run reports."""
    with suppress(OSError, UserError):
        return read_results(folder)
    return {}


def write_results(folder: Path, results: dict[str, Any]) -> Path:
    """Add results, JSON values by flat key, to the file of a run in one atomic write; they replace older ones."""
    text = json.dumps(read_results(folder) | results, indent=2)
    write_text(folder / RESULTS, text + "\n")
    return folder / RESULTS


def flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values under flat keys, ``prefix/name`` and ``prefix/name/inner``."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(f"{prefix}/{name}", value) if isinstance(value, dict) else {f"{prefix}/{name}": value}
    return result


def environment() -> dict[str, Any]:
    """Return package versions, machine and git commit."""
    import torch

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
