"""The job of a sweep command: its config is read and checked, and its cells are selected and run."""

import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from randlora_pl.commands.common import spelled
from randlora_pl.commands.data import absent as missing_file
from randlora_pl.data.catalog import CATALOG, default_root, get_command, present
from randlora_pl.data.locations import root_of
from randlora_pl.run.options.compose import read_config
from randlora_pl.run.options.shipped import config_folder, find_config
from randlora_pl.run.parallel.launch import launched
from randlora_pl.sweep import FILE, LOWEST, RATES, SweepConfig, checked, loop
from randlora_pl.sweep.climb import FINALISTS
from randlora_pl.sweep.folder import DONE, FAILED, OPEN, PRUNED, Progress, SweepFolder
from randlora_pl.sweep.loop import PAUSE, Loop, Outcome, Runner, end_with_parent, environments_of, local, visible_gpus
from randlora_pl.sweep.plan import Cell, is_text, only, shard
from randlora_pl.utils.errors import UserError, errors_in, full_disk
from randlora_pl.utils.files import parse_json
from randlora_pl.utils.options import Count, Folder, Option, Positive
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.reuse import caching
from randlora_pl.utils.text import byte_size, duration, log_to_terminal, table

if TYPE_CHECKING:
    from randlora_pl.sweep.search import Search


@dataclass(kw_only=True)
class WorkOptions:
    """Options of commands that run cells.

    Attributes:
        output: Folder to write (default: runs/sweeps/NAME, or runs/tune/NAME). Cells of another grid in it are kept.
        dry_run: Only list the cells with their state and their expected time.
        retry_failed: Run failed cells again (a diverged one fails again).
        jobs: Processes that share the work.
    """

    output: Folder | None = None
    dry_run: bool = False
    retry_failed: bool = False
    jobs: Count = 1

    def __post_init__(self) -> None:
        if launched() is not None:
            raise UserError("a sweep starts torchrun itself, see trainer.devices. Start it without torchrun or srun.")


@dataclass(kw_only=True)
class LimitedOptions(WorkOptions):
    """Options of commands that can end before their work does.

    Attributes:
        max_hours: Start no cell that is not expected to end within this time.
    """

    max_hours: Annotated[float, Positive, Option("H")] | None = None


@dataclass(kw_only=True)
class CellOptions(LimitedOptions):
    """Options that select cells of a sweep, and the launcher that runs them.

    Attributes:
        only: Run only some cells, by model, dataset, budget, method or seed, and tune by the first, second or fourth.
            Separate values with commas.
        skip_missing: Skip datasets that are not on this machine.
        root: Folder with the datasets, or the place of your own data (folder, table ...), if the config has none.
        launcher: slurm is for an array of N jobs. It needs the extra `slurm`.
        slurm: Options of submitit.
    """

    only: Annotated[Sequence[str], Option("KEY=VALUE")] = ()
    skip_missing: bool = False
    root: Annotated[str | None, Option("DIR", names=("--data.root",))] = None
    launcher: Literal["local", "slurm"] = "local"
    slurm: Annotated[Sequence[str], Option("KEY=VALUE")] = ()


@dataclass(kw_only=True)
class SweepOptions(CellOptions):
    """Options of a sweep.

    Attributes:
        seeds: Seeds to use instead of the config's.
        shard: Run every N-th cell, starting with the I-th, for machines without a shared disk.
        tune: Search the learning rates on validation samples, then run with the best ones. The config's section `tune`
            describes the search, which is in DIR/tune and resumes after a kill.
    """

    seeds: Sequence[int] | None = None
    shard: Annotated[str | None, Option("I/N")] = None
    tune: bool = False


@dataclass
class Job:
    """Sweep and the part of it that one command runs.

    Attributes:
        description: The sweep.
        cells: Every cell of it.
        folder: Its folder.
        typed: Options of the command.
        same: The typed command, for resuming.
        search: The search that selects the cells, if any.
        chosen: The cells that this command runs.
        absent: Labels of missing datasets.
        sources: How to get the missing datasets: commands, or the missing files and their source.
        outcome: What became of the cells.
        place: The folder as an argument of a command.
    """

    description: SweepConfig
    cells: list[Cell]
    folder: SweepFolder
    typed: WorkOptions
    same: str
    search: "Search | None" = None
    chosen: list[Cell] = field(init=False)
    absent: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)

    def __post_init__(self) -> None:
        self.chosen, self.place = self.cells, shlex.quote(str(self.folder.path))


def find_sweep(config: str) -> tuple[Path, SweepConfig]:
    """Return the file of a config and the sweep in it."""
    file = find_config(config)
    content = read_config(file)
    with errors_in(file):
        if isinstance(named := content.get("tuned"), str):  # a file next to it, or a bundled one
            places = [file.parent / named, config_folder() / "sweeps" / named]
            tuned = next((place for place in places if place.is_file()), places[0])
            try:
                content["tuned"] = checked(parse_json(tuned.read_text(encoding="utf-8")), str(tuned))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"tuned: {tuned} cannot be read ({error}). Give the {FILE} of a search.") from error
        return file, SweepConfig.from_content(content)


def check_root_is_read(cells: Iterable[Cell], root: str | None) -> None:
    """Refuse a data folder that no dataset of a sweep reads.

    Raises:
        UserError: None reads it; the message has what to do for images of one's own.
    """
    rows = [None if is_text(cell.tree) else CATALOG[cell.flat["data.dataset"]] for cell in cells]
    if root is None or any(row is None or row.own or row.layout for row in rows):
        return
    names = ", ".join(dict.fromkeys(row.name for row in rows if row))
    own = "For your own images, write a sweep with your data and a base model: docs/your_own_data.md"
    raise UserError(f"--data.root {root} is not read: the datasets of this sweep ({names}) have no files.", own)


def choose(job: Job, choices: Sequence[str] = (), part: str | None = None) -> None:
    """Choose the cells by the words of ``--only`` and the ``--shard``; but for a dry run, their datasets must be there.

    Raises:
        UserError: No cell is left, or a dataset is missing; one message lists all of them.
    """
    job.chosen = shard(only(job.cells, choices), part)
    job.absent, job.sources = _absent(job.chosen)
    skip_missing = isinstance(job.typed, CellOptions) and job.typed.skip_missing
    if job.absent and not skip_missing and not job.typed.dry_run:
        count = "1 dataset is" if len(job.absent) == 1 else f"{len(job.absent)} datasets are"
        raise UserError(
            f"{count} not on this machine: {', '.join(job.absent)}. Skip them with --skip-missing, or get them:",
            "; ".join(job.sources),
        )
    if skip_missing:
        job.chosen = [cell for cell in job.chosen if cell.labels.dataset not in job.absent]
    if not job.chosen:
        raise UserError("no cells left: --only, --shard and --skip-missing exclude all of them.")


def _absent(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """Return the missing datasets, and the commands that get them."""
    absent: list[str] = []
    commands: list[str] = []
    by_root: dict[Path, list[str]] = {}
    by_source: dict[str, dict[str, None]] = {}  # the first missing file of each text dataset, by where to get it
    for cell in {(*cell.labels[1:3], cell.untrained): cell for cell in cells}.values():
        label, data = cell.labels.dataset, cell.tree.get("data", {})
        given = data.get("root")
        if label in absent:
            continue
        if is_text(cell.tree):
            root = default_root() if given is None else Path(given).expanduser()
            if error := missing_file(data["dataset"], root, data.get("tests"), not cell.untrained):
                absent.append(label)
                by_source.setdefault(error.hint, {})[error.what] = None
            continue
        row = CATALOG[cell.flat["data.dataset"]]
        root = default_root() if given is None else root_of(str(given))
        if present(row, root):
            continue
        absent.append(label)
        if row.own:
            commands.append(f"{label} should be {root}")
        elif row.package:
            commands.append(get_command(row, root))
        else:
            by_root.setdefault(root, []).append(row.name)
    for root, names in by_root.items():
        place = "" if root == default_root() else f" --root {shlex.quote(str(root))}"
        commands.append(f"randlora-pl data get {' '.join(names)}{place}")
    for source, whats in by_source.items():
        more = f" ({len(whats) - 2} more like these)" if len(whats) > 2 else ""
        commands.append(f"{'; '.join(list(whats)[:2])}{more}. {source}")
    return absent, commands


def check(job: Job) -> None:
    """Check that each method fits its model, and can start from its first stage, and the options of the data.

    Raises:
        UserError: Names the model with the method or dataset; or the folder holds another sweep.
    """
    from randlora_pl.sweep import expand

    job.folder.check(job.cells)
    cells = [cell for cell in job.chosen if job.folder.state(cell) != DONE]
    _check_devices(job, [cell for cell in cells if cell.devices > 1])
    different: dict[tuple[str, str, str], Cell] = {}
    for cell in cells:  # a search changes more than rates
        changed = [(name, value) for name, value in cell.facts.items() if name not in (*RATES, "tunes")]
        different[cell.labels.model, str(cell.facts.get("tunes", cell.labels.method)), str(changed)] = cell
    for (model, method, _), cell in different.items():
        where = f"models.{model} with methods.{method}"
        with errors_in(where):
            expand.counts(cell.tree)
        if cell.first:
            with errors_in(f"{where}.first"):
                expand.counts(cell.first)
            with errors_in(where):
                expand.check_first(cell)
    for (model, dataset), cell in {(cell.labels.model, cell.labels.dataset): cell for cell in cells}.items():
        with errors_in(f"models.{model} with datasets.{dataset}"):
            expand.data_of(cell.tree)


def _check_devices(job: Job, cells: Sequence[Cell]) -> None:
    """Refuse cells on several devices if they cannot run."""
    if job.search is not None and job.search.pruner and cells:
        raise UserError("--pruner needs cells on one device. Remove it, or trainer.devices.")
    typed = job.typed if isinstance(job.typed, CellOptions) else CellOptions()
    if typed.slurm and typed.launcher != "slurm":
        raise UserError("--slurm needs --launcher slurm.")
    if typed.launcher == "slurm":
        if len({cell.devices for cell in job.chosen}) > 1:
            raise UserError("--launcher slurm: the cells differ in trainer.devices. Submit each part with --only.")
        return
    on_gpus = [cell.devices for cell in cells if cell.tree["trainer"].get("accelerator") != "cpu"]
    gpus, needed = len(visible_gpus()), job.typed.jobs * max(on_gpus, default=0)
    if 0 < gpus < needed:
        raise UserError(f"trainer.devices times --jobs is {needed}, but {gpus} GPUs are visible. Set fewer.")


def summary(job: Job) -> str:
    """Return the progress of a sweep as a short text."""
    states = [job.folder.state(cell) for cell in job.chosen]
    reasons = [str(job.folder.failure(cell).get("reason")) for cell in job.chosen if job.folder.state(cell) == FAILED]
    pruned = sum(reason.startswith(PRUNED) for reason in reasons)
    counts = {"failed": len(reasons) - pruned, PRUNED: pruned}
    more = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{states.count(DONE)} of {len(states)} cells are done{more} in {job.folder.path}"


def end(job: Job, following: str) -> int:
    """Print the progress of a sweep and the next command; return 1 if cells have failed, else 0."""
    stopped, elsewhere = job.outcome.stopped, job.outcome.elsewhere
    failed = [cell for cell in job.chosen if job.folder.state(cell) == FAILED]
    print(f"\n{summary(job)}" + (f"; other processes run {elsewhere}" if elsewhere else ""))
    for cell in failed[:5]:
        print(f"  failed: {cell.labels}: {job.folder.failure(cell).get('reason')}")
    if len(failed) > 5:
        print(f"  and {len(failed) - 5} more, each with a failed.json in {job.folder.path}/cells")
    if stopped:
        print(f"Stopped, because {stopped}. Resume with: {job.same}")
    elif failed:
        print(f"Retry them: {job.same}{'' if '--retry-failed' in job.same else ' --retry-failed'}")
    else:
        print(f"Next: {following}")
    return 1 if failed else 0


def child_words(job: Job, words: Sequence[str]) -> list[str]:
    """Return the command of one of several processes: with the typed options, this folder and without their number."""
    command = [*words, "--output", str(job.folder.path.resolve()), *import_words().split()]
    for name, value in vars(job.typed).items():
        if value not in (None, False, (), []) and name not in ("output", "jobs", "launcher", "slurm", "tune"):
            command.append("--data.root" if name == "root" else spelled(name))
            several = value if isinstance(value, list | tuple) else [value]
            command += [str(each) for each in several if each is not True]
    return command


def dry_run(job: Job) -> int:
    """Print the cells with their state, and the time of similar ones that have finished."""
    check(job)
    if job.search is not None and job.search.sampler == "tpe":
        print(f"Optuna selects {job.search.trials} candidates of each method, such as:\n")
    if job.search is not None and job.search.rule == LOWEST:
        seeds = ", ".join(map(str, job.search.seeds))
        best = f"the best {FINALISTS[LOWEST]} run with seeds {seeds}"
        print(f"Each method has {job.search.trials} candidates, of which {best}. Known by now:\n")
    times, rows, seconds, unknown = Progress(job.folder, job.cells).times, [], 0.0, 0
    for cell in job.chosen:
        state, done = job.folder.state(cell), job.folder.results(cell)
        took, memory = done.get("cell_seconds"), done.get("peak_memory_bytes")
        if state != DONE:
            state = "running" if job.folder.worker(cell) else state
            took = times.expected(cell)
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


def run(job: Job, words: Sequence[str]) -> bool:
    """Check the cells without weights and images, make the folder, and run them; return False if only submitted.

    They run in this process, or in several ones or jobs of the command that ``words`` are without its options.

    Raises:
        UserError: The disk is full.
        KeyboardInterrupt: With what is done and how to go on.
    """
    check(job)
    job.folder.open(job.description, job.cells)
    if job.absent:
        print(f"not on this machine, so skipped: {', '.join(job.absent)}")
    if isinstance(job.typed, CellOptions) and job.typed.launcher == "slurm":
        given = ["nodes=1", f"tasks_per_node={job.chosen[0].devices}", *job.typed.slurm]
        numbers = loop.slurm(run_in_job, child_words(job, words), job.folder.path.resolve(), job.typed.jobs, given)
        print(f"submitted {len(numbers)} jobs: {', '.join(numbers)}; their logs: {job.folder.path}/slurm")
        print(f"Show their progress: randlora-pl {shlex.join(words)} --output {job.place} --dry-run")
        return False
    try:
        job.outcome = spawn(job, child_words(job, words)) if job.typed.jobs > 1 else work(job)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"{summary(job)}; resume with: {job.same}") from None
    except UserError as error:
        if full_disk(error):
            raise UserError(f"{full_disk(error)}. {summary(job)}; free some space, then: {job.same}") from error
        raise
    return True


def run_in_job(words: list[str]) -> int:
    """Run the command of a submitted job.

    Raises:
        RuntimeError: The command ended with an error, which is in the job's log.
    """
    from randlora_pl.commands.main import main

    code = loop.in_task(lambda: main(words))
    if code > 1:  # 1: some cells failed, which the sweep has recorded
        raise RuntimeError(f"randlora-pl {shlex.join(words)} ended with {code}")
    return code


def work(job: Job) -> Outcome:
    """Run the cells in this process, and test them; the cells of a search are not tested."""
    end_with_parent()
    log_to_terminal()
    search, hours = job.search, job.typed.max_hours if isinstance(job.typed, LimitedOptions) else None
    runner, keep_adapters = Runner(), job.description.keep_adapters
    if search is not None:
        job.chosen = search.known()
        runner, keep_adapters = Runner(test=False, watcher=search.watcher), False
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    worker = Loop(job.folder, job.chosen, runner, job.typed.retry_failed, deadline, keep_adapters)
    if search is not None:
        worker.dropped = search.dropped
    with worker.watch.shown(), caching():
        outcome = worker.work()
        while search is not None and not outcome.stopped and not search.finished():
            before, cells = {cell.hash for cell in job.chosen}, search.known()
            if all(cell.hash in before for cell in cells):
                cells = search.known(ask=True)
            if all(cell.hash in before for cell in cells):
                time.sleep(PAUSE)
            job.chosen = worker.cells = cells
            worker.watch.follow(cells)
            outcome = worker.work()
    return outcome


def spawn(job: Job, words: Sequence[str]) -> Outcome:
    """Run the cells in several processes of this machine, by the command of each, and show their progress."""
    folder, search = job.folder, job.search
    progress = Progress(folder, job.chosen, jobs=job.typed.jobs)

    def look() -> None:
        if search is not None:
            job.chosen = search.known()
            progress.follow(job.chosen)
        for cell in progress.look(PAUSE):
            progress.print_line(cell)

    with progress.shown():
        environments = environments_of(job.typed.jobs, max(cell.devices for cell in job.chosen))
        codes = local(["randlora_pl", *words], folder.path / "logs", environments, look)
    if search.finished() if search is not None else all(folder.state(cell) != OPEN for cell in job.chosen):
        return Outcome()
    lost = len([code for code in codes if code not in (0, 1)])
    ended = f"{lost} of {len(codes)} processes ended early (see {folder.path}/logs)"
    return Outcome(stopped=ended if lost else "the time is up")
