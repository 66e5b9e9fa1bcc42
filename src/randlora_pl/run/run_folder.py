"""Run folders: paths, names, and the options in which two configs of one run must agree."""

import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import SoftFileLease

from randlora_pl.run.options.classes import plain, rate_name
from randlora_pl.run.options.compose import CLASSES, Command, Tree, flatten, normalize
from randlora_pl.run.parallel.launch import broadcast_decision, decide_first, process_rank
from randlora_pl.utils import lease as leases
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import parse_json, write_bytes
from randlora_pl.utils.lease import acquire, lease_on, owner_of
from randlora_pl.utils.run_files import ADAPTER, CONFIG, LAST, RESULTS, find_adapter, runs_in, unlink_latest

if TYPE_CHECKING:
    from randlora_pl.adapters import Adapter

CHECKSUM = "# SHA-256 of the lines below: "
_ENVIRONMENT = "RANDLORA_PL_RUN_FOLDER"
"""Environment variable by which the processes that Lightning starts for further devices get the run folder."""

_FIXED = (
    "model", "model.name", "model.pretrained", "model.img_size", "model.targets", "data.dataset",
    "data.split", "data.classes", "model.tokenizer", "model.config_overrides",
)  # fmt: skip


def planned_name(flat: dict[str, Any]) -> str:
    """Return a run's default name, from its config by short names: dataset, model, prompts and adapter."""
    prompts, adapter = (str(flat.get(f"model.{name}", "")).rpartition(".")[2] for name in ("prompts", "adapter"))
    words = (
        str(flat.get("data.dataset", "digits")),
        Path(str(flat.get("model.name", "tiny"))).name,
        prompts,
        "" if prompts and rate_name(adapter, None) == "prompt_learning_rate" else adapter,
    )
    return "_".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") for word in words if word)


def new_folder(root: Path, name: str, option: str = "--run.root") -> Path:
    """Make ``root/name/TIME``; a second run in the same second gets its own.

    Raises:
        UserError: The name has a slash, or the folder cannot be made; ``option`` sets another root.
    """

    def make() -> str:
        if re.search(r"[/\\]|^\.*$", name):
            raise UserError(f"run.name is {name!r}: give a plain name without slashes. Set the folder with --run.root.")
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        for number in range(1, 100):
            folder = root / name / (stamp if number == 1 else f"{stamp}_{number}")
            try:
                folder.mkdir(parents=True)
                return str(folder)
            except FileExistsError:
                continue
            except OSError as error:
                what = f"The run folder {folder} cannot be created ({error.strerror})."
                raise UserError(f"{what} See {option}.") from error
        raise UserError(f"{root / name} already has a hundred runs of this second. Give another --run.name.")

    return Path(decide_first("the run folder", _ENVIRONMENT, make))


def is_stamp(name: str) -> bool:
    """Return True if a folder has the time of a run as its name, as `new_folder` gives it."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", name) is not None


def output_folder(output: str | None, name: str) -> Path:
    """Return a new folder for results: the typed ``--output``, or ``runs/name/TIME``.

    Raises:
        UserError: The folder exists, or cannot be made.
    """
    if output is None:
        return new_folder(Path("runs"), name, "--output")
    check_new(output)
    try:
        Path(output).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be created ({error.strerror}). Name another --output.") from error
    return Path(output)


def check_new(output: str | None) -> str | None:
    """Return a folder that does not exist, or None.

    Raises:
        UserError: The folder exists.
    """
    if output is not None and Path(output).exists():
        raise UserError(f"{output} exists and is not overwritten. Name a new folder.")
    return output


def missing_folders(folder: Path) -> list[Path]:
    """Return the missing ones of a folder and its parents, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_folder(folder: Path, made: Iterable[Path] = ()) -> None:
    """Remove a run folder without a checkpoint or an adapter, and empty parents ``made`` for it, innermost first."""
    if (folder / LAST).exists() or (folder / ADAPTER).exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    unlink_latest(folder)
    os.environ.pop(_ENVIRONMENT, None)
    for parent in made:
        try:
            parent.rmdir()
        except OSError:
            return


def check_run(folder: Path) -> Path:
    """Return the config of a run folder.

    Raises:
        UserError: The folder is not a run folder, or its config was changed.
    """
    if not (folder / CONFIG).is_file():
        runs = [run for name in sorted(folder.glob("*/")) for run in runs_in(name)]
        hint = f" A run in it: {runs[-1]}" if runs else " A run folder is ROOT/NAME/TIME, see runs/."
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}.{hint}")
    file = folder / CONFIG
    text = file.read_text(encoding="utf-8", errors="replace")
    sums = [line.removeprefix(CHECKSUM) for line in text.split("\n") if line.startswith(CHECKSUM)]
    if sums and sums[0] != checksum(without_head(text)):
        raise UserError(
            f"{file} is cut off or damaged, or was edited: copy it again, or delete the line with its checksum to use "
            "it unchanged. To change an option, add it after --resume."
        )
    return file


def checksum(text: str) -> str:
    """Return the SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def without_head(text: str) -> str:
    """Return a config without the lines of comments above it."""
    lines = text.split("\n")
    while lines and lines[0].startswith("#"):
        del lines[0]
    return "\n".join(lines)


def run_to_resume(root: Path, name: str, command: str) -> Path | None:
    """Return the newest run of a name that is unfinished, or finished by the same command, for ``--resume auto``.

    Args:
        root: Folder of all runs.
        name: Name of the run.
        command: Checksum of the command, see `Command.checksum`.
    """
    for folder in reversed(runs_in(root / name)):
        results = results_of(folder)
        if not results.get("finished") or results.get("command") == command:
            return folder
    return None


def results_of(folder: Path) -> dict[str, Any]:
    """Return the results of a run; empty if they are damaged, which a resumed run reports."""
    file = folder / RESULTS
    try:
        return dict(parse_json(file.read_text(encoding="utf-8"))) if file.is_file() else {}
    except (ValueError, TypeError):
        return {}


def keep_older(file: Path) -> None:
    """Copy a file that is about to be written again to the first free ``NAME.1``, ``NAME.2`` ..."""
    for number in range(1, 1000):
        older = file.with_name(f"{file.name}.{number}")
        if not older.exists():
            write_bytes(older, file.read_bytes())
            return


def architecture(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the options that a checkpoint depends on: task, base model, targets, dataset, and all adapter options.

    Args:
        flat: A config by short names.
    """
    fixed = {key: flat[key] for key in _FIXED if key in flat}
    parts = ("model.adapter", "model.prompts", "model.head")
    fixed |= {key: value for key, value in flat.items() if f"{key}.".startswith(tuple(f"{part}." for part in parts))}
    return {key: str(value).rpartition(".")[2] if key in CLASSES else value for key, value in fixed.items()}


def check_architecture(command: Command, saved: Tree, source: Path) -> None:
    """Refuse to use saved weights for something else.

    Args:
        command: The command; its config is the saved one with the typed options on top.
        saved: The config that the weights were trained with.
        source: Path of the weights.

    Raises:
        UserError: An option that the weights depend on differs; the message has both values.
    """
    theirs, ours = architecture(flatten(normalize(saved))), architecture(command.flat())
    clashes = [
        f"--{key} is {ours[key]}, in the run {theirs[key]}"
        for key in ours
        if key in theirs and ours[key] != theirs[key] and str(ours[key]).lower() != str(theirs[key]).lower()
    ]
    if clashes:
        raise UserError(
            f"{source} was trained with another model: {'; '.join(clashes[:3])}. Remove the option, or start a new run."
        )


def resolved_config(tree: Tree, model: dict[str, Any], data: dict[str, Any]) -> Tree:
    """Return a parsed config with derived values filled in, usable as ``--config`` again.

    Args:
        tree: The parsed config as plain values.
        model: Constructor arguments of the task that were derived.
        data: Derived constructor arguments of the data module.
    """
    tree = normalize(tree)
    options = dict(tree["model"]["init_args"]) | {name: plain(value) for name, value in model.items()}
    options.pop("seed", None)  # seed_everything sets it
    tree["model"] = tree["model"] | {"init_args": options}
    tree["data"] = {key: value for key, value in (tree["data"] | data).items() if key != "seed"}
    left_out = {"config"}
    for start in ("ckpt_path", "from_adapter"):
        if tree.get(start):  # a run that is killed early starts from it again, in any working directory
            tree[start] = str(Path(tree[start]).resolve())
        else:
            left_out |= {start, *(["from_form"] if start == "from_adapter" else [])}
    return {key: value for key, value in tree.items() if key not in left_out}


def without_seed(adapter: "Adapter", given: Mapping[str, Any] | None) -> "Adapter":
    """Return a copy of an adapter whose seed is left to the run, unless it was given.

    Args:
        adapter: The adapter; DoRA's inner method is used instead of DoRA.
        given: Its part of the parsed config.
    """
    options = (given or {}).get("init_args") or {}
    inner = getattr(adapter, "inner", None)
    if inner is not None:
        return adapter.replace(inner=without_seed(inner, options.get("inner")))
    return adapter if adapter.trains_base or options.get("seed") is not None else adapter.replace(seed=None)


FILE = ".lock"
_LOOK = 0.2
"""Seconds between two reads of another process's lease."""


@contextmanager
def locked(folder: Path) -> Iterator[SoftFileLease]:
    """Hold the lock of a run folder; only on rank 0 of a job.

    Args:
        folder: The run folder; it exists.

    Yields:
        The lease, whose ``compromise`` is set once it is lost.

    Raises:
        UserError: Another process works in the folder, or the folder cannot be written.
    """
    lease = lease_on(folder / FILE)
    broadcast_decision("the lock of the run folder", lambda: "" if process_rank() else _take(lease, folder))
    try:
        yield lease
    finally:
        lease.release()


def _take(lease: SoftFileLease, folder: Path) -> str:
    """Acquire a lease as soon as its owner is dead."""
    first: tuple[int, int] | None = None
    for look in range(round(2 * leases.LEASE / _LOOK)):
        try:
            if acquire(lease):
                return ""
        except OSError as error:
            what = f"{folder} cannot be written ({error.strerror}); make it writable to train in it."
            raise UserError(what) from None
        try:
            state = (folder / FILE).stat()
        except OSError:  # released, or taken over, meanwhile
            continue
        renewed = (state.st_ino, state.st_mtime_ns)
        first = first or renewed
        if renewed != first:
            raise UserError(
                f"{owner_of(lease)} is training in {folder}. Wait until it ends or stop it, then resume the run."
            )
        if look == round(2 * leases.BEAT / _LOOK):
            wait = f"waiting up to {leases.LEASE:.0f} s for its lock"
            print(f"{owner_of(lease)} shows no activity; {wait}", file=sys.stderr)
        time.sleep(_LOOK)
    raise UserError(f"{owner_of(lease)} holds {folder / FILE}. Delete that file if the process is dead.")


def find_lora(start: str) -> Path:
    """Return the LoRA that rank 0 finds: when the others look, the newest run of a name may be the new one itself.

    Raises:
        UserError: See `find_adapter`; also the errors of `decide_first`.
    """

    def find() -> str:
        lora = find_adapter(start)
        return str(lora.resolve() if lora.exists() else lora)  # a missing one is named as it was typed

    return Path(decide_first("--from-adapter", "RANDLORA_PL_FROM_ADAPTER", find))
