"""``sweep``: every cell of a grid of models, datasets, budgets, methods and seeds, each a run folder."""

import argparse
import os
import shlex
from pathlib import Path

from randlora_pl.commands.sweep.job import Job, begin, check_typed, child_words, end, job_of, parser_of, place_of
from randlora_pl.commands.sweep.run import dry_run, spawn, work
from randlora_pl.sweep.folder import REPORT
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.own_classes import import_words


def sweep_verb(args: list[str]) -> int:
    """Run, or list, the cells of a sweep; see `run_sweep`."""
    return run_sweep(args, f"randlora-pl sweep {shlex.join(args)}{import_words()}")[0]


def run_sweep(args: list[str], same: str, name: str = "sweep") -> tuple[int, Job | None]:
    """Run, or list, the cells of a sweep.

    Args:
        args: The options of ``sweep``.
        same: The typed command, for resuming.
        name: Name of the typed command, for its errors.

    Returns:
        0, or 1 if cells failed; and the job of this call, None if nothing was run.
    """
    parser = parser_of(name)
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--slurm", nargs="+", action="extend", default=[])
    parser.add_options(shard=str, seeds=[int], tune=False)
    typed = parser.parse_args(args)
    check_typed(typed)
    if typed.tune:
        from randlora_pl.commands.sweep.tune import tune_first

        if not tune_first(typed, same):
            return 0, None
    if typed.slurm and typed.launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm.")
    job = job_of(typed, same)
    if typed.dry_run:
        job.folder.check(job.cells)
        return dry_run(job), None
    begin(job)
    config = os.path.realpath(typed.config) if Path(typed.config).is_file() else typed.config
    words = child_words(["sweep", config], typed, job)  # by a path that is valid in any folder
    if typed.launcher == "slurm":
        return _submit(typed, words, job), None
    following = f"randlora-pl report {place_of(job)}{' --overwrite' * (job.folder.path / REPORT).exists()}"
    if typed.jobs > 1:
        return end(job, following, spawn(job, words, typed.jobs)), job
    outcome = work(job, typed)
    if job.description.baselines and not outcome.stopped and not outcome.elsewhere:  # after the last cell of all
        from randlora_pl.lab.baselines import measure

        measure(job.folder.path, job.chosen)
    return end(job, following, outcome.stopped, outcome.elsewhere), job


def _submit(typed: argparse.Namespace, words: list[str], job: Job) -> int:
    from randlora_pl.sweep.launch import slurm

    numbers = slurm(run_in_job, words, job.folder.path.resolve(), typed.jobs, typed.slurm)
    print(f"submitted {len(numbers)} jobs: {', '.join(numbers)}; their logs: {job.folder.path}/slurm")
    print(f"Show their progress: randlora-pl sweep {shlex.quote(typed.config)} --output {place_of(job)} --dry-run")
    return 0


def run_in_job(words: list[str]) -> int:
    """Run the command of a submitted job.

    Raises:
        RuntimeError: The command ended with an error, which is in the job's log.
    """
    from randlora_pl.commands.main import main

    code = main(words)
    if code > 1:  # 1: some cells failed, which the sweep has recorded
        raise RuntimeError(f"randlora-pl {shlex.join(words)} ended with {code}")
    return code
