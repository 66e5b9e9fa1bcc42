"""Execution of the cells of a sweep: in this process, in several, or as a list of estimates."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from randlora_pl.commands.sweep.job import Job, check_data, check_stages, summary
from randlora_pl.sweep.folder import DONE, FAILED, OPEN
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.text.console import silence_library_warnings
from randlora_pl.utils.text.formatting import byte_size, duration
from randlora_pl.utils.text.tables import table

if TYPE_CHECKING:
    from randlora_pl.sweep.estimate import Estimate, Estimator
    from randlora_pl.sweep.loop import Outcome
    from randlora_pl.sweep.progress import Progress

Rounds = Callable[[], list[Trial]]
"""Function that returns the cells known so far; it returns more once the first of them are done."""


def dry_run(job: Job) -> int:
    """Print the cells with their state and estimated cost."""
    silence_library_warnings()
    from randlora_pl.sweep.estimate import COUNTED, MEASURED

    check_stages(job.chosen)
    check_data(job.chosen)
    estimator = estimator_of(job)
    rows, seconds, sources, unknown = [], 0.0, set(), 0
    for cell in job.chosen:
        state = job.folder.state(cell)
        done = job.folder.results(cell)
        took, memory, source = done.get("cell_seconds"), done.get("peak_memory_bytes"), ""
        if state != DONE:
            state = "running" if job.folder.worker(cell) else state
            found = _estimate(estimator, cell)
            took, memory, source = found.seconds, found.bytes, found.source
            seconds, unknown = seconds + (took or 0.0), unknown + (took is None)
            sources.add(source)
        shown = (duration(took) if took else "?", byte_size(memory) if memory else "?", source)
        rows.append([cell.hash, *cell.labels, state, *shown])
    print(table(["cell", "model", "dataset", "budget", "method", "seed", "state", "time", "memory", "from"], rows))
    states = [row[6] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"\n{len(rows)} cell{'s' * (len(rows) != 1)}: {counts}")
    if seconds or unknown:
        known = f"{duration(seconds)} in one process" if seconds else ""
        rest = f"not known for {unknown} cells until similar ones have finished" if unknown else ""
        print(f"Expected time for the rest: {', '.join(filter(None, (known, rest)))}")
    if MEASURED in sources:
        print("measured: from similar finished cells of this sweep, scaled by optimizer steps and test samples")
    if COUNTED in sources:
        print("counted: memory of weights, gradients and the optimizer's state, without activations")
    if job.absent:
        print(f"Not on this machine: {', '.join(job.absent)}. Get them:")
        print("\n".join(f"  {source}" for source in job.sources))
    return 0


def _estimate(estimator: "Estimator", cell: Trial) -> "Estimate":
    with errors_in(f"models.{cell.labels.model} with methods.{cell.labels.method}"):
        try:
            return estimator(cell)
        except (TypeError, ValueError) as error:  # such as steps that are a list
            raise UserError(f"an option has a value of the wrong type ({error}).") from error


def estimator_of(job: Job) -> "Estimator":
    """Return an estimator that has read the finished cells of a sweep."""
    from randlora_pl.sweep.estimate import Estimator

    estimator = Estimator(job.folder, job.cells)
    estimator.refresh()
    return estimator


def work(
    job: Job, retry_failed: bool, max_hours: float | None, rounds: Rounds | None = None, test: bool = True
) -> "Outcome":
    """Run the cells in this process, and test them.

    Args:
        job: The job to run.
        retry_failed: If True, run failed cells again.
        max_hours: Hours after which to stop.
        rounds: The cells, if some depend on others; by default all chosen cells.
        test: False to leave out the tests.

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
    estimator = estimator_of(job)
    progress = Progress(job.folder, job.chosen, estimator)
    loop = Loop(
        job.folder, job.chosen, Runner(test), progress, lambda error: bool(full_disk(error)), retry_failed,
        deadline=None if max_hours is None else time.monotonic() + 3600 * max_hours,
        seconds=lambda cell: (found.seconds or 0.0) if (found := estimator.measured(cell)) else 0.0,
        keep_adapters=test and job.description.keep_adapters, wait=rounds is not None,
    )  # fmt: skip
    try:
        with progress.shown(), caching():
            outcome = loop.work()
            while rounds is not None and not outcome.stopped and len(rounds()) > len(job.chosen):
                job.chosen = loop.cells = progress.cells = rounds()
                outcome = loop.work()
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{summary(job)}; resume with: {job.same}") from None
    except UserError as error:
        if full_disk(error):
            raise UserError(f"{full_disk(error)}. {summary(job)}; free some space, then: {job.same}") from error
        raise
    return outcome


def spawn(job: Job, words: Sequence[str], jobs: int, rounds: Rounds | None = None) -> str:
    """Run the cells in several processes of this machine, and show their progress.

    Args:
        job: The job to run.
        words: The command of each process.
        jobs: Number of processes.
        rounds: As in `work`.

    Returns:
        The reason of an early stop; empty if all cells were run.

    Raises:
        KeyboardInterrupt: With what is done and how to go on.
    """
    from randlora_pl.sweep.launch import local
    from randlora_pl.sweep.progress import Progress

    estimator = estimator_of(job)
    progress = Progress(job.folder, job.chosen, estimator, jobs=jobs)
    reported = {cell.hash for cell in job.chosen if job.folder.state(cell) != OPEN}

    def look() -> None:
        job.chosen = progress.cells = job.chosen if rounds is None else rounds()
        progress.scan()
        fresh = [cell for cell in job.chosen if cell.hash not in reported and job.folder.state(cell) != OPEN]
        if fresh:
            estimator.refresh()
        for cell in fresh:
            reported.add(cell.hash)
            progress.print_line(cell, _what(progress, cell))

    try:
        with progress.shown():
            codes = local(words, job.folder.path, jobs, look)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{summary(job)}; resume with: {job.same}") from None
    if not any(job.folder.state(cell) == OPEN for cell in job.chosen):
        return ""
    lost = [code for code in codes if code not in (0, 1)]
    return (
        f"{len(lost)} of {len(codes)} processes ended early (see {job.folder.path}/logs)" if lost else "the time is up"
    )


def _what(progress: "Progress", cell: Trial) -> str:
    from randlora_pl.sweep.progress import accuracy

    folder = progress.folder
    if folder.state(cell) == FAILED:
        return f"failed: {folder.failure(cell).get('reason')}"
    seconds = folder.results(cell).get("cell_seconds")  # written last
    return accuracy(folder, cell) + ("" if seconds is None else f" in {duration(seconds)}")
