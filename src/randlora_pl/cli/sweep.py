"""``sweep``: every cell of a grid of models, data sets, budgets, methods and seeds, each a run folder."""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randlora_pl.cli.cells import composer
from randlora_pl.cli.compose import read_config
from randlora_pl.cli.configs import find_config
from randlora_pl.cli.parsing import Parser
from randlora_pl.cli.tables import table
from randlora_pl.data.catalog import CATALOG, default_root, get_command, present
from randlora_pl.data.own.places import root_of
from randlora_pl.errors import Terminated, UserError
from randlora_pl.experiments.sweep.description import Description
from randlora_pl.experiments.sweep.folder import DONE, FAILED, SweepFolder
from randlora_pl.experiments.sweep.plan import Cell, only, plan, shard
from randlora_pl.parallel.launch import launched

PAGE = """\
Run a grid of models, data sets, budgets, methods and seeds. Each cell is a run folder; what is done is never done again,
so the same command goes on after a crash, Ctrl-C or a reboot, and several processes may work on one sweep.

  randlora-pl sweep sweeps/offline --dry-run
  randlora-pl sweep sweeps/offline --jobs 2
  randlora-pl sweep sweeps/table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
  randlora-pl sweep sweeps/table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

  CONFIG                What to run: a shipped config (randlora-pl config list) or a file
  --output DIR          The sweep's folder (default runs/sweeps/NAME); cells of another grid in it are kept
  --dry-run             Only list the cells, with their state and the time and memory that they are expected to take
  --only KEY=VALUE ...  Some cells: model, dataset, budget, method or seed; several values with commas
  --shard I/N           Every N-th cell, beginning with the I-th: for machines that share no disk
  --retry-failed        Run cells again that failed before
  --max-hours H         Begin no cell that is not expected to end within this time
  --skip-missing        Leave out data sets that are not on this machine
  --data.root DIR       Folder of the data sets
  --jobs N              Processes that share the work (default 1, in this one)
  --launcher WHERE      local (default), or slurm: an array of N jobs through submitit (pip install 'randlora-pl[slurm]')
  --slurm KEY=VALUE ... Options of submitit for it
"""


@dataclass
class Job:
    """A sweep that was asked for.

    Attributes:
        description: The sweep.
        cells: Every cell of it.
        chosen: The cells that this command is about.
        folder: Where it goes.
        absent: Labels of data sets that are left out.
    """

    description: Description
    cells: list[Cell]
    chosen: list[Cell]
    folder: SweepFolder
    absent: list[str]


def sweep_verb(args: list[str]) -> int:
    """Run, or list, the cells of a sweep.

    Returns:
        0, or 1 where cells failed.

    Raises:
        UserError: An option, or something in the config, is wrong; a data set is missing; the disk is full.
        KeyboardInterrupt: With what is done and how to go on.
    """
    typed = _parse(args)
    job = read(typed.config, typed.output, typed.root)
    choose(job, typed.only, typed.shard, typed.skip_missing)
    if typed.dry_run:
        job.folder.check(job.cells)
        return dry_run(job)
    same = f"randlora-pl sweep {shlex.join(args)}"
    if typed.launcher == "slurm":
        begin(job)
        return _submit(typed, args, job)
    if typed.jobs > 1:
        begin(job)
        return _spawn(typed, args, job, same)
    begin(job)
    return work(job, same, typed.retry_failed, typed.max_hours)


def _parse(args: list[str]) -> argparse.Namespace:
    parser = Parser("sweep")
    parser.add_argument("config")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--shard")
    parser.add_argument("--retry-failed", action="store_true")
    parser.add_argument("--max-hours", type=float)
    parser.add_argument("--skip-missing", action="store_true")
    parser.add_argument("--data.root", dest="root")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--slurm", nargs="+", default=[])
    typed = parser.parse_args(args)
    if typed.jobs < 1:
        raise UserError(f"--jobs is {typed.jobs}: give a positive whole number.")
    if typed.max_hours is not None and not typed.max_hours > 0:
        raise UserError(f"--max-hours is {typed.max_hours}: give a positive number of hours.")
    if typed.slurm and typed.launcher != "slurm":
        raise UserError("--slurm goes with --launcher slurm.")
    job = launched()
    if job is not None and job.world > 1:
        raise UserError("a cell runs in one process: start the sweep without torchrun or srun, with --jobs N.")
    return typed


def read(config: str, output: Path | None, root: str | None, kind: str = "sweeps") -> Job:
    """A sweep from its config, every name in it checked.

    Args:
        config: A shipped config or a file.
        output: Its folder, or None for the usual place.
        root: Folder of the data sets, or None for the usual place.
        kind: Folder of all such folders, below ``runs``.

    Raises:
        UserError: It cannot be read, or says something unknown.
    """
    file = find_config(config)
    try:
        description = Description.of(read_config(file))
        cells = plan(description, composer(root))
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error
    path = Path("runs") / kind / file.stem if output is None else output
    return Job(description, cells, cells, SweepFolder(path), [])


def choose(job: Job, choices: Sequence[str], part: str | None, skip_missing: bool) -> None:
    """Chooses the cells that a command is about, and asks for their data sets.

    Raises:
        UserError: Nothing is left, or a data set is missing; one message names all of them.
    """
    job.chosen = shard(only(job.cells, choices), part)
    missing: dict[str, str] = {}
    for label, cell in {cell.labels.dataset: cell for cell in job.chosen}.items():
        row = CATALOG[cell.flat["data.dataset"]]
        given = cell.tree.get("data", {}).get("root")
        root = default_root() if given is None else root_of(str(given))
        if not present(row, root):
            missing[label] = f"{label} ({root})" if row.own else get_command(row, root)
    if missing and not skip_missing:
        raise UserError(
            f"{len(missing)} of the data sets are not on this machine: {', '.join(missing)}. "
            f"Get them, or leave them out with --skip-missing:\n{'; '.join(missing.values())}"
        )
    job.absent = list(missing)
    job.chosen = [cell for cell in job.chosen if cell.labels.dataset not in missing]
    if not job.chosen:
        raise UserError("no cell is left: --only, --shard and --skip-missing leave out all of them.")


def begin(job: Job) -> None:
    """Tries what can be tried without weights and images, and makes the folder.

    Raises:
        UserError: An option of a cell is impossible, or the folder holds another sweep.
    """
    from randlora_pl.cli.train import quieten

    quieten()
    from randlora_pl.experiments.sweep.build import counts, data_of

    job.folder.check(job.cells)
    pairs = {(cell.labels.model, cell.labels.method): cell for cell in job.chosen if job.folder.state(cell) != DONE}
    for (model, method), cell in pairs.items():
        _told(f"models.{model} with methods.{method}", lambda tree: counts(tree, forward=False), cell.tree)
    for label, cell in {cell.labels.dataset: cell for cell in pairs.values()}.items():
        _told(f"datasets.{label}", data_of, cell.tree)
    job.folder.open(job.description, job.cells)
    if job.absent:
        print(f"left out, for want of the data: {', '.join(job.absent)}")


def _told(where: str, function: Any, tree: Any) -> None:
    try:
        function(tree)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def dry_run(job: Job) -> int:
    """Prints the cells with their state and what they are expected to take."""
    from randlora_pl.cli.train import quieten

    quieten()
    from randlora_pl.experiments.sweep.estimate import COUNTED, MEASURED
    from randlora_pl.experiments.sweep.progress import clock

    estimator = estimator_of(job)
    rows, seconds, sources, unknown = [], 0.0, set(), 0
    for cell in job.chosen:
        state = job.folder.state(cell)
        state = "running" if state != DONE and job.folder.worker(cell) else state
        found = _told_estimate(estimator, cell)
        done = job.folder.results(cell)
        took = done.get("cell_seconds") if done else found.seconds
        memory = done.get("peak_memory_bytes") if done else found.bytes
        if state != DONE:
            sources.add(found.source)
            seconds, unknown = seconds + (found.seconds or 0.0), unknown + (found.seconds is None)
        shown = [cell.hash, *cell.labels, state, clock(took) if took else "?", f"{memory / 2**20:,.0f} MiB" if memory else "?"]
        rows.append([*shown, "" if done else found.source])
    print(table(["cell", "model", "data set", "budget", "method", "seed", "state", "time", "memory", "from"], rows))
    states = [row[6] for row in rows]
    print(f"\n{len(rows)} cells: {', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))}")
    if seconds or unknown:
        more = f", and {unknown} cells of which nothing is known" if unknown else ""
        print(f"Expected for what is left: {clock(seconds)} in one process{more}")
    if MEASURED in sources:
        print("measured: from finished cells of this sweep that are alike, by their optimizer steps and test images")
    if COUNTED in sources:
        print(
            "counted: roughly, from parameters and floating point operations at 30 % of the speed of a large matrix\n"
            "         product on this CPU; memory is weights, gradients and AdamW's moments, without activations"
        )
    if job.absent:
        print(f"left out, for want of the data: {', '.join(job.absent)}")
    return 0


def _told_estimate(estimator: Any, cell: Cell) -> Any:
    try:
        return estimator(cell)
    except UserError as error:
        raise UserError(f"models.{cell.labels.model} with methods.{cell.labels.method}: {error}") from error


def estimator_of(job: Job) -> Any:
    """Estimates the cells of a sweep."""
    import torch

    from randlora_pl.bench.flops import Gemm
    from randlora_pl.experiments.sweep.estimate import Estimator

    estimator = Estimator(job.folder, job.cells, Gemm(torch.device("cpu"), torch.float32, 1024).rate)
    estimator.refresh()
    return estimator


def work(job: Job, same: str, retry_failed: bool, max_hours: float | None, test: bool = True) -> int:
    """Runs the cells in this process.

    Args:
        job: What to run.
        same: The command that was typed, to go on with.
        retry_failed: Whether to run failed cells again.
        max_hours: When to stop.
        test: Whether cells are tested.

    Raises:
        KeyboardInterrupt: With what is done and how to go on.
    """
    from randlora_pl.callbacks.console import log_to_terminal
    from randlora_pl.cli.cells import Runner
    from randlora_pl.cli.explain import full_disk
    from randlora_pl.experiments.sweep.loop import Loop
    from randlora_pl.experiments.sweep.progress import Progress
    from randlora_pl.keep import keeping

    log_to_terminal()
    estimator = estimator_of(job)
    progress = Progress(job.folder, job.chosen, estimator)
    loop = Loop(
        job.folder, job.chosen, Runner(test), progress, lambda error: bool(full_disk(error)), retry_failed,
        deadline=None if max_hours is None else time.monotonic() + 3600 * max_hours,
        seconds=lambda cell: (found.seconds or 0.0) if (found := estimator.measured(cell)) else 0.0,
        keep_adapters=job.description.keep_adapters,
    )  # fmt: skip
    try:
        with progress.shown(), keeping():
            outcome = loop.work()
    except KeyboardInterrupt as stop:
        kind = Terminated if isinstance(stop, Terminated) else KeyboardInterrupt
        raise kind(f"{summary(job)}; go on with: {same}") from None
    except UserError as error:
        raise UserError(f"{error}\n{summary(job)}; go on with: {same}" if full_disk(error) else str(error)) from error
    return end(job, same, outcome.stopped, outcome.elsewhere)


def summary(job: Job) -> str:
    """How far a sweep is, in a few words."""
    states = [job.folder.state(cell) for cell in job.chosen]
    failed = f", {states.count(FAILED)} failed" if FAILED in states else ""
    return f"{states.count(DONE)} of {len(states)} cells are done{failed} in {job.folder.path}"


def end(job: Job, same: str, stopped: str = "", elsewhere: int = 0) -> int:
    """Says how far a sweep is and what comes next.

    Returns:
        0, or 1 where cells have failed.
    """
    failed = [cell for cell in job.chosen if job.folder.state(cell) == FAILED]
    print(f"\n{summary(job)}" + (f"; {elsewhere} are run by other processes" if elsewhere else ""))
    for cell in failed[:5]:
        print(f"  failed: {cell.labels}: {job.folder.failure(cell).get('reason')}")
    if len(failed) > 5:
        print(f"  and {len(failed) - 5} more, each with its failed.json in {job.folder.path}/cells")
    if stopped:
        print(f"Stopped, because {stopped}. Go on with: {same}")
    elif failed:
        print(f"Try those again: {same}{'' if '--retry-failed' in same else ' --retry-failed'}")
    else:
        print(f"Next: randlora-pl report {shlex.quote(str(job.folder.path))}")
    return 1 if failed else 0


def _words(args: list[str], job: Job) -> list[str]:
    """The command of one of several processes: without what says how many, and with whole paths."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--jobs", "--launcher", "--output"):
        parser.add_argument(option)
    parser.add_argument("--slurm", nargs="+")
    _, rest = parser.parse_known_args(args)
    return ["sweep", *rest, "--output", str(job.folder.path.resolve())]


def _spawn(typed: argparse.Namespace, args: list[str], job: Job, same: str) -> int:
    from randlora_pl.experiments.sweep.launch import local
    from randlora_pl.experiments.sweep.progress import Progress

    estimator = estimator_of(job)
    progress = Progress(job.folder, job.chosen, estimator)
    told = {cell.hash for cell in job.chosen if job.folder.state(cell) != "open"}

    def look() -> None:
        progress.scan()
        fresh = [cell for cell in job.chosen if cell.hash not in told and job.folder.state(cell) != "open"]
        if fresh:
            estimator.refresh()
        for cell in fresh:
            told.add(cell.hash)
            progress.tell(cell, _what(job, cell))

    try:
        with progress.shown():
            codes = local(_words(args, job), job.folder.path, typed.jobs, look)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{summary(job)}; go on with: {same}") from None
    lost = [code for code in codes if code not in (0, 1)]
    left = [cell for cell in job.chosen if job.folder.state(cell) not in (DONE, FAILED)]
    stopped = "the time is up" if left and not lost else ""
    if lost:
        stopped = f"{len(lost)} of {len(codes)} processes ended early (see {job.folder.path}/logs)" if left else ""
    return end(job, same, stopped) or (1 if lost and left else 0)


def _what(job: Job, cell: Cell) -> str:
    from randlora_pl.experiments.sweep.progress import accuracy, clock

    failure = job.folder.failure(cell)
    if job.folder.state(cell) == FAILED:
        return f"failed: {failure.get('reason')}"
    return f"{accuracy(job.folder, cell)} in {clock(job.folder.results(cell).get('cell_seconds', 0.0))}"


def _submit(typed: argparse.Namespace, args: list[str], job: Job) -> int:
    from randlora_pl.experiments.sweep.launch import slurm

    words = _words(args, job)
    words[1 + words[1:].index(typed.config)] = _whole(typed.config)
    numbers = slurm(words, job.folder.path.resolve(), typed.jobs, typed.slurm)
    print(f"submitted {len(numbers)} jobs: {', '.join(numbers)}; their logs: {job.folder.path}/slurm")
    print(f"How far they are: randlora-pl sweep {shlex.quote(typed.config)} --output {job.folder.path} --dry-run")
    return 0


def _whole(config: str) -> str:
    """A config's file by a path that holds in any folder; a shipped one by its name."""
    return os.path.realpath(config) if Path(config).is_file() else config


