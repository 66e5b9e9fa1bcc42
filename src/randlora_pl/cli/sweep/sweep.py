"""``sweep``: every cell of a grid of models, data sets, budgets, methods and seeds, each a run folder."""

import argparse
import os
import shlex
from pathlib import Path

from randlora_pl.cli.sweep.job import Job, begin, check_typed, end, job_of, parser_of, place_of, words_of
from randlora_pl.cli.sweep.run import dry_run, spawn, work
from randlora_pl.utils.errors import UserError

PAGE = """\
Run a grid of models, data sets, budgets, methods and seeds. Each cell is a run folder; what is done is never done
again, so the same command goes on after a crash, Ctrl-C or a reboot, and several processes may work on one sweep.

  randlora-pl sweep offline --dry-run
  randlora-pl sweep offline --jobs 2
  randlora-pl sweep mine.yaml --tune          searches the learning rates first, see: randlora-pl tune --help
  randlora-pl sweep table11 --only budget=16-shot dataset=dtd,eurosat --max-hours 8
  randlora-pl sweep table11 --launcher slurm --jobs 16 --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=600

  CONFIG                What to run: a shipped config (randlora-pl config list) or a file
  --output DIR          The sweep's folder (default runs/sweeps/NAME); cells of another grid in it are kept
  --dry-run             Only list the cells, with their state and the time and memory that they are expected to take
  --only KEY=VALUE ...  Some cells: model, dataset, budget, method or seed; several values with commas
  --shard I/N           Every N-th cell, beginning with the I-th: for machines that share no disk
  --retry-failed        Run cells again that failed before
  --max-hours H         Begin no cell that is not expected to end within this time
  --skip-missing        Leave out data sets that are not on this machine
  --data.root DIR       Folder that holds the data sets, or the place of your own (folder, table ...), if the config
                        gives none
  --tune                Search the learning rates on validation samples, then run with the best. The config's part
                        `tune` says what is tried; goes on after a kill, too. The search is in DIR/tune
  --jobs N              Processes that share the work (default 1)
  --launcher WHERE      local (default), or slurm: an array of N jobs by submitit (pip install 'randlora-pl[slurm]')
  --slurm KEY=VALUE ... Options of submitit for it
"""


def sweep_verb(args: list[str]) -> int:
    """Run, or list, the cells of a sweep.

    Returns:
        0, or 1 where cells failed.

    Raises:
        UserError: An option, or something in the config, is wrong; a data set is missing; the disk is full.
        KeyboardInterrupt: With what is done and how to go on.
    """
    parser = parser_of("sweep")
    parser.add_argument("--shard")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--slurm", nargs="+", action="extend", default=[])
    parser.add_argument("--tune", action="store_true")
    typed = parser.parse_args(args)
    check_typed(typed)
    same = f"randlora-pl sweep {shlex.join(args)}"
    if typed.tune:
        from randlora_pl.cli.sweep.tune_first import tune_first

        tuned = tune_first(typed, same)
        if tuned is None:
            return 0
        typed, args = tuned
    if typed.slurm and typed.launcher != "slurm":
        raise UserError("--slurm goes with --launcher slurm.")
    job = job_of(typed, same)
    if typed.dry_run:
        job.folder.check(job.cells)
        return dry_run(job)
    begin(job)
    if typed.launcher == "slurm":
        return _submit(typed, args, job)
    following = f"randlora-pl report {place_of(job)}"
    if typed.jobs > 1:
        return end(job, following, spawn(job, words_of("sweep", args, job), typed.jobs))
    outcome = work(job, typed.retry_failed, typed.max_hours)
    return end(job, following, outcome.stopped, outcome.elsewhere)


def _submit(typed: argparse.Namespace, args: list[str], job: Job) -> int:
    from randlora_pl.experiments.sweep.launch import slurm

    words = words_of("sweep", args, job)
    if Path(typed.config).is_file():  # by a path that holds in any folder
        words[words.index(typed.config)] = os.path.realpath(typed.config)
    numbers = slurm(run_in_job, words, job.folder.path.resolve(), typed.jobs, typed.slurm)
    print(f"submitted {len(numbers)} jobs: {', '.join(numbers)}; their logs: {job.folder.path}/slurm")
    print(f"How far they are: randlora-pl sweep {shlex.quote(typed.config)} --output {place_of(job)} --dry-run")
    return 0


def run_in_job(words: list[str]) -> int:
    """What a submitted job runs.

    Raises:
        RuntimeError: The command ended with an error, which the job's log tells.
    """
    from randlora_pl.cli.main import main

    code = main(words)
    if code > 1:  # 1: some cells failed, which the sweep has recorded
        raise RuntimeError(f"randlora-pl {shlex.join(words)} ended with {code}")
    return code
