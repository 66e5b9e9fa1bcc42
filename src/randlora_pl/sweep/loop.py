"""Work on a sweep: the loop of one process over cells, a cell as a run, and several processes at once.

Processes are started on this machine, or as a SLURM array through submitit. A cell on several devices has a process on
each, started by torchrun or by the tasks of a job of submitit.
"""

import copy
import gc
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from itertools import count, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import SoftFileLease

from randlora_pl.run import run_folder as leases
from randlora_pl.run.options.compose import Command, Tree, merge, normalize, read_config
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.run.options.saved_config import check_run
from randlora_pl.run.parallel.launch import Launch, broadcast_decision, meeting_of
from randlora_pl.run.run_folder import FILE, acquire, holder, lease_on, locked
from randlora_pl.sweep.folder import DONE, FAILED, FIRST, FIRST_SECONDS, Progress, SweepFolder
from randlora_pl.sweep.plan import Cell
from randlora_pl.utils.errors import LostProcessError, Terminated, UserError, first_line, full_disk, install
from randlora_pl.utils.files import disk_errors, read_mapping, write_text
from randlora_pl.utils.machine import usable_cores
from randlora_pl.utils.own_classes import named_modules
from randlora_pl.utils.run_files import CONFIG, LAST, read_results

if TYPE_CHECKING:
    from lightning.pytorch import Callback

PAUSE = 1.0
"""Seconds between two looks at what other processes are doing."""


@dataclass
class Outcome:
    """End of one process.

    Attributes:
        elsewhere: Cells that another process was running at the end.
        stopped: Why it stopped before the end, empty if it did not.
    """

    elsewhere: int = 0
    stopped: str = ""


@dataclass
class Loop:
    """One process at work on a sweep.

    Attributes:
        cells: The process's part of the cells, in order.
        run: Runs a cell in its folder to its end, or raises; returns True after a SIGTERM that only Lightning saw.
        retry_failed: Cells that have failed before are tried once more.
        deadline: Value of ``time.monotonic`` after which no cell begins, and none that is expected to end later.
        keep_adapters: Whether finished cells keep their adapter.
        dropped: Whether a cell is not needed any more.
        watch: Progress to show.
    """

    folder: SweepFolder
    cells: Sequence[Cell]
    run: Callable[[Cell, Path], bool | None]
    retry_failed: bool = False
    deadline: float | None = None
    keep_adapters: bool = True
    dropped: Callable[[Cell], bool] = lambda cell: False
    watch: Progress = field(init=False)
    _leases: dict[str, SoftFileLease] = field(default_factory=dict)
    _tries: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = Progress(self.folder, self.cells)

    def work(self) -> Outcome:
        """Run every cell that is neither finished nor running elsewhere, until none is left.

        Raises:
            UserError: The disk is full, or the folder cannot be written.
            Terminated: A SIGTERM came while Lightning handled it, and the cell had no step left.
            KeyboardInterrupt: As the cell raised it; the cell is free for others.
        """
        for cell in self.cells:
            self._tries.setdefault(cell.hash, int(self.folder.failure(cell).get("tries", 0)))
        left, patience = list(self.cells), time.monotonic() + 2 * leases.LEASE
        while left:
            passed: list[Cell] = []
            for cell in left:
                if self._settled(cell) or self.dropped(cell):
                    continue
                seconds = self.watch.times.expected(cell) or 0.0
                if self.deadline is not None and time.monotonic() + seconds > self.deadline:
                    return Outcome(stopped="the time is up")
                if not self._one(cell):
                    passed.append(cell)
            if passed:
                running = [bool(self.folder.worker(cell)) for cell in passed]
                if any(running) or len(passed) < len(left):
                    patience = time.monotonic() + 2 * leases.LEASE  # by then every dead owner has been succeeded
                if all(running) or time.monotonic() > patience:
                    return Outcome(elsewhere=len(passed))
                time.sleep(PAUSE)
            left = passed
        return Outcome()

    def _settled(self, cell: Cell) -> bool:
        state = self.folder.state(cell)
        if state == FAILED and self.retry_failed:  # unless another process has just done so
            return bool(self.folder.failure(cell).get("tries", 0) != self._tries[cell.hash])
        return state in (DONE, FAILED)

    def _one(self, cell: Cell) -> bool:
        """Run a cell unless another process does; return True if it is settled now."""
        lease = self._leases.setdefault(cell.hash, lease_on(self.folder.lock(cell)))
        with disk_errors(self.folder.path, ""):
            if not acquire(lease):
                return False
        terminated = False
        try:
            if self._settled(cell):  # another process may have ended it before the lock was taken
                return True
            self.watch.started(cell)
            try:
                terminated = bool(self.run(cell, self.folder.begin(cell)))
                if not self.folder.results(cell):
                    raise UserError("it ended before its last step")
                self.folder.succeed(cell, self.keep_adapters)
            except Exception as error:  # whatever else a cell dies of, the others can go on
                if full_disk(error):
                    raise
                self.folder.fail(cell, **failure_of(error))
            self.watch.ended(cell)
        finally:
            lease.release()
        if terminated:
            raise Terminated
        return True


def failure_of(error: Exception) -> dict[str, str]:
    """Return the reason of a failed cell; and the traceback, empty for a mistake of the user."""
    ours = isinstance(error, UserError | LostProcessError)
    reason = str(error) if ours else f"{type(error).__name__}: {error}"
    return {"reason": reason, "traceback": "" if isinstance(error, UserError) else traceback.format_exc()}


class Runner:
    """Runs cells in this process, one after the other; a cell on several devices has processes of its own.

    Args:
        test: Whether cells are tested; a search leaves the test images alone.
        watcher: Returns a callback that may end a cell early, or None.
    """

    def __init__(self, test: bool = True, watcher: "Callable[[Cell], Callback | None]" = lambda cell: None) -> None:
        self.test, self.watcher = test, watcher

    def __call__(self, cell: Cell, folder: Path) -> bool:
        """Run a cell from its checkpoint, or from its beginning; content that cannot be resumed is removed.

        Returns:
            True if SIGTERM came during the test, where Lightning takes note of it and continues.

        Raises:
            UserError: As `fit`; so are all others.
        """
        if cell.devices > 1:
            run_processes(cell, folder, self.test)
            return False
        with suppress(OSError):  # Linux counts the peak of the resident set from here on
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        output = io.StringIO()  # the run's log has it, too
        try:
            with redirect_stdout(output), redirect_stderr(output):
                # in a context of its own: jsonargparse keeps the last parser in a variable
                return copy_context().run(self.run, cell, folder)
        finally:
            gc.collect()  # Lightning's objects refer to each other, and each holds a model

    def run(self, cell: Cell, folder: Path) -> bool:
        """Run a cell in this process, or its part of it; see `__call__`."""
        from randlora_pl.run import lightning_cli, session, stages
        from randlora_pl.run.callbacks.summary import callbacks_of

        start = time.perf_counter()
        with locked(folder) as lock:
            again = bool(broadcast_decision("the checkpoint", lambda: "resume" * self._resumable(cell, folder)))
            if cell.first and not again and not read_results(folder / FIRST).get("finished"):
                (folder / FIRST).mkdir(exist_ok=True)
                stage = replace(cell, tree=cell.first, first={})
                if Runner(test=False).run(stage, folder / FIRST):
                    raise Terminated
            app = lightning_cli.App(self.command(cell, folder, again), folder if again else None, folder)
            with session.handle_run_errors(app):
                if cell.untrained:
                    stages.evaluate(app, None)
                    none = {"trainable_parameters": 0, "adapter_parameters": 0}  # though all of the model could train
                    stages.write(app, none | {"finished": True, "device": str(app.task.device.type)})
                else:
                    if callback := self.watcher(cell):
                        callbacks_of(app.trainer).append(callback)
                    stages.fit(app, lock, zero_shot=False, test=self.test)
                own = {"cell_seconds": round(time.perf_counter() - start, 3)} if not again else {}
                first = read_results(folder / FIRST).get("fit_seconds") if cell.first else None
                stages.write(app, own | ({} if first is None else {FIRST_SECONDS: first}))
            return app.trainer.received_sigterm

    def command(self, cell: Cell, folder: Path = Path(), again: bool = False) -> Command:
        """Return the command that a cell is, in its folder."""
        if cell.first and again:  # its method depends on the LoRA, and is in the config that the run wrote
            may_differ = (("data", "root"), ("trainer", "accelerator"))
            typed = [(group, name) for group, name in may_differ if name in cell.tree.get(group, {})]
            place = {group: {name: cell.tree[group][name]} for group, name in typed}
            tree = merge(normalize(read_config(folder / CONFIG)), place)
        else:
            how: Tree = {"trainer": {"devices": cell.devices, "enable_progress_bar": False}, "run": {"logger": "csv"}}
            tree = merge(how, cell.tree) | {"trainer": merge(cell.tree.get("trainer", {}), how["trainer"])}
            if cell.first:
                tree |= {"from_adapter": str(folder / FIRST), "from_form": cell.form}
        command = Command("test" if cell.untrained else "fit", config=copy.deepcopy(tree))
        check_names(command)
        return command

    @staticmethod
    def _resumable(cell: Cell, folder: Path) -> bool:
        """Return True if a broken-off cell has a checkpoint to resume from; else its folder is emptied."""
        from randlora_pl.run.callbacks.checkpoint import check_checkpoint

        with suppress(UserError):
            if not cell.untrained and (folder / LAST).is_file():
                check_run(folder)
                check_checkpoint(folder / LAST)
                return True
        for path in folder.iterdir():
            if path.name in ("cell.json", "failed.json", FILE, FIRST):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return False


PARENT = "RANDLORA_PL_SWEEP_PARENT"
"""Environment variable of the processes that a sweep starts."""

_PATIENCE = 60.0
"""Seconds that processes get to end their step after SIGTERM."""

PROCESS = "randlora_pl.sweep.cell_process"
"""Module that is one process of a cell."""
CELL, ERROR = "cell.json", "error.json"
"""Files that these processes share: what they run, and the first error."""


def local(
    words: Sequence[str], logs: Path, environments: Sequence[dict[str, str]], look: Callable[[], object]
) -> list[int]:
    """Run a module in a process for each environment, until all have ended; their output goes to the folder ``logs``.

    About once a second it calls ``look``, and ends them if that returns True. Ctrl-C reaches this process alone.

    Returns:
        Their exit codes.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM, once all have ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []

    try:
        for number, environment in enumerate(environments, 1):
            with (logs / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-{number}.log").open("ab") as log:
                command, env = [sys.executable, "-m", *words], environment | {PARENT: "stdin"}
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, stdin=subprocess.PIPE, env=env, start_new_session=True
                )
            started.append(process)
        while (running := [process for process in started if process.poll() is None]) and not look():
            with suppress(subprocess.TimeoutExpired):
                running[0].wait(PAUSE)
        look()
    finally:
        for process in started:
            process.send_signal(signal.SIGTERM)
        until = time.monotonic() + _PATIENCE
        for process in started:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()  # closes its input, also of processes that a killed torchrun has left
    return [process.returncode for process in started]


def end_with_parent() -> None:
    """End a process that a sweep started as SIGTERM does when its parent is gone, even if the parent was killed.

    Its standard input is a pipe without data: it closes with the process that holds the other end.
    """
    if os.environ.pop(PARENT, None) is None:  # popped: processes that this one starts have another input
        return

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE)
        os._exit(1)  # its locks then belong to a dead owner

    threading.Thread(target=wait, name="sweep-parent", daemon=True).start()


def environments_of(jobs: int, devices: int) -> list[dict[str, str]]:
    """Return the environment of each process: its part of the cores, and its GPUs if there are several."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cores() // (jobs * devices)))
    environment, gpus = os.environ | {"OMP_NUM_THREADS": threads}, visible_gpus()
    if len(gpus) < 2:
        return [environment] * jobs
    turns = cycle(gpus)
    return [environment | {"CUDA_VISIBLE_DEVICES": ",".join(islice(turns, devices))} for _ in range(jobs)]


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, without starting CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # empty: none
    devices = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    return list(map(str, range(len(devices)))) if visible is None else [each for each in visible.split(",") if each]


def run_processes(cell: Cell, place: Path, test: bool) -> None:
    """Run a cell in a process per device, and wait for them. The first error of one is raised."""
    until = time.monotonic() + _PATIENCE
    while holder(place / FILE) and time.monotonic() < until:  # processes of a sweep that was killed are ending
        time.sleep(PAUSE)
    folder = (place.parents[1] / "logs" / cell.hash).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    task = {"cell": asdict(cell), "place": str(place.resolve()), "test": test, "modules": list(named_modules())}
    write_text(folder / CELL, json.dumps(task))
    if _task:
        _task[0](folder)
    else:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(cell.devices), "-m"]
        local([*torchrun, PROCESS, str(folder)], folder, environments_of(1, cell.devices), lambda: None)
    if (folder / ERROR).exists():
        error = read_mapping(folder / ERROR)
        kind = LostProcessError if error["traceback"] else UserError
        raise kind(error["reason"]) from RuntimeError(error["traceback"])
    if not read_results(place).get("finished"):
        raise LostProcessError(f"a process was killed, for example because memory ran out: {folder}")


_task: list[Callable[[Path], None]] = []  # in the first task of a job of submitit: runs a cell in all tasks


def in_task(lead: Callable[[], int]) -> int:
    """Run a sweep in the first task of a job of submitit, and its processes of cells in the others; return the code."""
    from submitit.helpers import TorchDistributedEnvironment

    task = TorchDistributedEnvironment()
    if task.world_size == 1:
        return lead()
    task.export(set_cuda_visible_devices=False, overwrite=True)
    os.environ.pop("SLURM_STEP_ID", None)  # the sweep itself is one process
    meeting = meeting_of(Launch(task.rank, task.world_size, 1, task.world_size), math.inf)
    numbers, store = map(str, count(1)), meeting.store

    def run_rank(folder: Path) -> None:
        own, number = meeting.decided("the cell", lambda: str(folder)), next(numbers)
        # as torchrun does; to the store each cell is another attempt, whose keys are new
        elastic = {"TORCHELASTIC_RUN_ID": "cell", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environment = os.environ | elastic | {"TORCHELASTIC_RESTART_COUNT": number}
        (code,) = local([PROCESS, own], Path(own), [environment], lambda: store.check([number]))
        if code and not store.check([number]):
            store.set(number, str(code))  # ends the processes of the other tasks
        if code and store.get(number) in (b"143", b"-15"):  # SLURM ends the job
            raise Terminated

    try:
        if task.rank == 0:
            _task.append(run_rank)
            return lead()
        with suppress(UserError):  # the sweep has ended
            while True:
                run_rank(Path())
        return 0
    finally:
        meeting.leave("the sweep has ended", lost=False)


def slurm(
    run: Callable[[list[str]], int], words: Sequence[str], folder: Path, jobs: int, options: Sequence[str]
) -> list[str]:
    """Submit an array of jobs that work on one sweep.

    Args:
        run: Runs a command in a job; of a module, so that the job can import it.
        words: The command after ``randlora-pl`` that each of them runs.
        folder: The sweep, on a disk that all machines see; submitit keeps its files in ``FOLDER/slurm``.
        jobs: Number of jobs.
        options: ``key=value`` words for submitit's ``update_parameters``, such as ``slurm_partition=gpu``,
            ``timeout_min=600`` and ``gpus_per_node=1``; ``cluster=local`` and ``cluster=debug`` run them here.

    Returns:
        Numbers of the jobs.

    Raises:
        UserError: submitit is not installed, an option is wrong, or SLURM is missing.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError(f"--launcher slurm needs submitit: {install('slurm')}") from error
    parameters: dict[str, Any] = {}
    for word in options:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--slurm {word}: expected KEY=VALUE, such as slurm_partition=gpu.")
        number = int(value) if value.isdecimal() else value
        if parameters.setdefault(key, number) != number:
            raise UserError(f"--slurm {word}: the cells need {key}={parameters[key]}. Remove it.")
    tasks = parameters.get("tasks_per_node", 1)
    if tasks != parameters.get("gpus_per_node", tasks) and tasks > 1:
        raise UserError(f"--slurm gpus_per_node must be {tasks}, as trainer.devices.")
    cluster = str(parameters.pop("cluster", "slurm"))
    try:
        executor = submitit.AutoExecutor(folder=str(folder / "slurm"), cluster=cluster)
        defaults = {"name": f"sweep-{folder.name}", "slurm_srun_args": ["--kill-on-bad-exit=1"]}
        executor.update_parameters(**defaults | parameters)
        submitted = executor.map_array(run, [list(words)] * jobs)
        if cluster == "debug":
            for job in submitted:
                job.result()
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError, OSError,
            subprocess.SubprocessError) as error:  # fmt: skip
        raise UserError(f"--launcher slurm: {first_line(error)}") from error
    return [str(job.job_id) for job in submitted]
