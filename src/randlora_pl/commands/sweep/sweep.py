"""``sweep``: every cell of a grid of models, datasets, budgets, methods and seeds, each a run folder."""

import os
import shlex
from pathlib import Path
from typing import Annotated

from randlora_pl.commands.sweep.job import Job, SweepOptions, begin, child_words, end, job_of, place_of
from randlora_pl.commands.sweep.run import dry_run, spawn, work
from randlora_pl.sweep.folder import REPORT
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.option_types import Option, Words
from randlora_pl.utils.own_classes import import_words


def sweep(config: Annotated[str, Option("CONFIG")], options: SweepOptions, words: Words) -> int:
    """Run a grid of models, datasets, budgets, methods and seeds.

    Each cell is a run folder. Finished cells are skipped, so you can run the same command again after a crash, Ctrl-C
    or a reboot. Several processes can share a sweep.

    Examples:
        randlora-pl sweep offline --dry-run
        randlora-pl sweep offline --jobs 2
        randlora-pl sweep mine.yaml --tune          search the learning rates first (randlora-pl tune --help)
        randlora-pl sweep table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
        randlora-pl sweep table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

    Args:
        config: Sweep to run: a bundled config (randlora-pl config list) or a file
    """
    return run_sweep(config, options, f"{words.command('sweep')}{import_words()}")[0]


def run_sweep(config: str, typed: SweepOptions, same: str) -> tuple[int, Job | None]:
    """Run, or list, the cells of a sweep.

    Args:
        config: Name or file of the sweep.
        typed: The options.
        same: The typed command, for resuming.

    Returns:
        0, or 1 if cells failed; and the job of this call, None if nothing was run.
    """
    typed.check_launch()
    if typed.tune:
        from randlora_pl.commands.sweep.tune import tune_first

        tuned = tune_first(config, typed, same)
        if tuned is None:
            return 0, None
        config, typed = tuned
    if typed.slurm and typed.launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm.")
    job = job_of(config, typed, same)
    if typed.dry_run:
        job.folder.check(job.cells)
        return dry_run(job), None
    begin(job)
    config = os.path.realpath(config) if Path(config).is_file() else config
    words = child_words(["sweep", config], typed, job)  # by a path that is valid in any folder
    if typed.launcher == "slurm":
        return _submit(config, typed, words, job), None
    following = f"randlora-pl report {place_of(job)}{' --overwrite' * (job.folder.path / REPORT).exists()}"
    if typed.jobs > 1:
        return end(job, following, spawn(job, words, typed.jobs)), job
    outcome = work(job, typed)
    if job.description.baselines and not outcome.stopped and not outcome.elsewhere:  # after the last cell of all
        from randlora_pl.lab.baselines import measure

        measure(job.folder.path, job.chosen)
    return end(job, following, outcome.stopped, outcome.elsewhere), job


def _submit(config: str, typed: SweepOptions, words: list[str], job: Job) -> int:
    from randlora_pl.sweep.launch import slurm

    numbers = slurm(run_in_job, words, job.folder.path.resolve(), typed.jobs, typed.slurm)
    print(f"submitted {len(numbers)} jobs: {', '.join(numbers)}; their logs: {job.folder.path}/slurm")
    print(f"Show their progress: randlora-pl sweep {shlex.quote(config)} --output {place_of(job)} --dry-run")
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
