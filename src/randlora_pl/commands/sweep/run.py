"""Execution of the cells of a sweep: in this process, in several, or as a list."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from randlora_pl.commands.sweep.job import Job, WorkOptions, check, summary
from randlora_pl.sweep.folder import DONE, OPEN
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text.console import silence_library_warnings
from randlora_pl.utils.text.formatting import byte_size, duration
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.sweep.loop import Outcome
    from randlora_pl.sweep.search import Search

_PAUSE = 1.0
"""Seconds between two looks at what other processes find."""


def dry_run(job: Job) -> int:
    """Print the cells with their state, and the time of similar ones that have finished."""
    silence_library_warnings()
    from randlora_pl.sweep.progress import Times

    check([cell for cell in job.chosen if job.folder.state(cell) != DONE])
    times, rows, seconds, unknown = Times(), [], 0.0, 0
    for cell in job.cells:
        if took := job.folder.results(cell).get("cell_seconds"):
            times.add(cell, took)
    for cell in job.chosen:
        state, done = job.folder.state(cell), job.folder.results(cell)
        took, memory = done.get("cell_seconds"), done.get("peak_memory_bytes")
        if state != DONE:
            state = "running" if job.folder.worker(cell) else state
            took = times.of(cell)
            seconds, unknown = seconds + (took or 0.0), unknown + (took is None)
        shown = duration(took) if took else "?", byte_size(memory) if memory else "?"
        rows.append([cell.hash, *cell.labels, state, *shown])
    print(table(["cell", "model", "dataset", "budget", "method", "seed", "state", "time", "memory"], rows))
    states = [row[6] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"\n{len(rows)} cell{'s' * (len(rows) != 1)}: {counts}")
    if seconds or unknown:
        known = f"{duration(seconds)} in one process" if seconds else ""
        rest = f"not known for {unknown} cells until similar ones have finished" if unknown else ""
        print(f"Expected time for the rest: {', '.join(filter(None, (known, rest)))}")
    if job.absent:
        print(f"Not on this machine: {', '.join(job.absent)}. Get them:")
        print("\n".join(f"  {source}" for source in job.sources))
    return 0


def work(job: Job, typed: WorkOptions, search: "Search | None" = None) -> "Outcome":
    """Run the cells in this process, and test them.

    Args:
        job: The job to run.
        typed: ``retry_failed`` and ``max_hours``.
        search: The search that finds the cells, which are not tested then; by default all chosen cells are run.

    Raises:
        UserError: The disk is full.
        KeyboardInterrupt: With what is done and how to go on.
    """
    from randlora_pl.run.error_messages import full_disk
    from randlora_pl.sweep.cell_runner import Runner
    from randlora_pl.sweep.launch import end_with_parent
    from randlora_pl.sweep.loop import Loop
    from randlora_pl.sweep.progress import Progress
    from randlora_pl.utils.reuse import caching
    from randlora_pl.utils.text.console import log_to_terminal

    end_with_parent()
    log_to_terminal()
    if search is not None:
        job.chosen = search.known()
    progress = Progress(job.folder, job.chosen)
    runner = Runner() if search is None else Runner(test=False, watcher=search.watcher)
    loop = Loop(
        job.folder, job.chosen, runner, progress, lambda error: bool(full_disk(error)), typed.retry_failed,
        deadline=None if typed.max_hours is None else time.monotonic() + 3600 * typed.max_hours,
        seconds=lambda cell: progress.times.of(cell) or 0.0,
        keep_adapters=search is None and job.description.keep_adapters,
    )  # fmt: skip
    if search is not None:
        loop.dropped = search.dropped
    try:
        with progress.shown(), caching():
            outcome = loop.work()
            while search is not None and not outcome.stopped and not search.finished():
                before, cells = {cell.hash for cell in job.chosen}, search.known()
                if all(cell.hash in before for cell in cells):
                    cells = search.known(ask=True)
                if all(cell.hash in before for cell in cells):
                    time.sleep(_PAUSE)
                job.chosen = loop.cells = cells
                progress.follow(cells)
                outcome = loop.work()
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{summary(job)}; resume with: {job.same}") from None
    except UserError as error:
        if full_disk(error):
            raise UserError(f"{full_disk(error)}. {summary(job)}; free some space, then: {job.same}") from error
        raise
    return outcome


def spawn(job: Job, words: Sequence[str], jobs: int, search: "Search | None" = None) -> str:
    """Run the cells in several processes of this machine, and show their progress.

    Args:
        job: The job to run.
        words: The command of each process.
        jobs: Number of processes.
        search: As in `work`.

    Returns:
        The reason of an early stop; empty if all cells were run.

    Raises:
        KeyboardInterrupt: With what is done and how to go on.
    """
    from randlora_pl.sweep.launch import local
    from randlora_pl.sweep.progress import Progress

    folder = job.folder
    progress = Progress(folder, job.chosen, jobs=jobs)

    def look() -> None:
        if search is not None:
            job.chosen = search.known()
            progress.follow(job.chosen)
        for cell in progress.look(_PAUSE):
            progress.print_line(cell)

    try:
        with progress.shown():
            codes = local(words, folder.path, jobs, look)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{summary(job)}; resume with: {job.same}") from None
    if search.finished() if search is not None else all(folder.state(cell) != OPEN for cell in job.chosen):
        return ""
    lost = [code for code in codes if code not in (0, 1)]
    return f"{len(lost)} of {len(codes)} processes ended early (see {folder.path}/logs)" if lost else "the time is up"
