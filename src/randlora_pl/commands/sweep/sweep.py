"""``sweep``: every cell of a grid, each a run folder. ``compare-methods``: a sweep of all methods, and its table."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from randlora_pl.commands.sweep import job as jobs
from randlora_pl.commands.sweep.job import Job, SweepOptions
from randlora_pl.commands.sweep.tune import tune_first
from randlora_pl.sweep.description import Seeds, fit
from randlora_pl.sweep.folder import REPORT, SweepFolder
from randlora_pl.sweep.loop import slurm
from randlora_pl.sweep.plan import plan
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files import write_text
from randlora_pl.utils.options import Option, Words
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

    Returns:
        0, or 1 if cells failed; and the job of this call, None if nothing was run.
    """
    if typed.tune:
        tuned = tune_first(config, typed, same)
        if tuned is None:
            return 0, None
        config, typed = tuned
    if typed.slurm and typed.launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm.")
    file, description = jobs.find_sweep(config)
    if typed.seeds is not None:
        fit(list(typed.seeds), Seeds, "--seeds")
        description = replace(description, seeds=list(typed.seeds))
    with errors_in(file):
        cells = plan(replace(description, root=typed.root))
        jobs.check_root_is_read(cells, typed.root)
    path = Path("runs") / "sweeps" / file.stem if typed.output is None else typed.output
    job = Job(description, cells, cells, SweepFolder(path), same)
    jobs.choose(job, typed.only, typed.shard, typed.skip_missing, typed.dry_run)
    if typed.dry_run:
        job.folder.check(job.cells)
        return jobs.dry_run(job), None
    jobs.begin(job)
    config = os.path.realpath(config) if Path(config).is_file() else config
    words = jobs.child_words(["sweep", config], typed, job)  # by a path that is valid in any folder
    if typed.launcher == "slurm":
        numbers = slurm(run_in_job, words, job.folder.path.resolve(), typed.jobs, typed.slurm)
        print(f"submitted {len(numbers)} jobs: {', '.join(numbers)}; their logs: {job.folder.path}/slurm")
        print(f"Show their progress: randlora-pl sweep {shlex.quote(config)} --output {jobs.place_of(job)} --dry-run")
        return 0, None
    following = f"randlora-pl report {jobs.place_of(job)}{' --overwrite' * (job.folder.path / REPORT).exists()}"
    if typed.jobs > 1:
        return jobs.end(job, following, jobs.spawn(job, words, typed.jobs)), job
    outcome = jobs.work(job, typed)
    if job.description.baselines and not outcome.stopped and not outcome.elsewhere:  # after the last cell of all
        from randlora_pl.lab.baselines import measure

        measure(job.folder.path, job.chosen)
    return jobs.end(job, following, outcome.stopped, outcome.elsewhere), job


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


def compare_methods(
    words: Words,
    *,
    config: Annotated[str, Option("SWEEP")] = "compare_methods",
    methods: Sequence[str] = (),
    options: SweepOptions,
) -> int:
    """Compare all methods on one few-shot dataset over several seeds.

    The command runs a sweep, then prints the mean and standard error of each method and of two classifiers of raw
    pixels, also to DIR/table.md. Run the same command again to resume after Ctrl-C.

    Examples:
        randlora-pl compare-methods                                 16 shots of the digits, 3 seeds
        randlora-pl compare-methods --methods RandLoRA-6 --seeds 4 5

    Args:
        config: Sweep to run: a bundled one or a file
        methods: Run only these methods
    """
    if methods:
        options = replace(options, only=[*options.only, f"method={','.join(methods)}"])
    code, job = run_sweep(config, options, words.command("compare-methods"))
    if job is None or not any(map(job.folder.results, job.chosen)):
        return code
    from randlora_pl.lab.baselines import method_tables
    from randlora_pl.lab.report.collect import read_sweep

    text = method_tables(read_sweep(job.folder.path), job.chosen)
    write_text(job.folder.path / "table.md", text)
    print(f"\n{text}\nAlso in {job.folder.path / 'table.md'}")
    return code
