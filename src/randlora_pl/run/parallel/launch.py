"""Processes of a job before they train: the launcher that started them, and what they ask each other.

The launcher is none, torchrun, SLURM's srun, or Lightning starting one more process. Questions and answers go through
the store for rendezvous, and each wait ends.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

from randlora_pl.run import TIMEOUT
from randlora_pl.utils.errors import LostProcessError, UserError, brief, first_line

GRACE = 30.0
"""Seconds that the process with the store waits for the others to read why the job ends."""
_END = "the end of a comparison"
Ask = Callable[[str], list[str]]
"""Function that returns the answers of all processes to a question, by rank."""


class Meeting:
    """Processes of a job that compare what they have, before any tensor is exchanged.

    Rank 0 posts numbered questions and decisions, and the others read them in this order.

    Attributes:
        exchanges: True while the processes exchange tensors: nothing waits at the store then.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float) -> None:
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self._run = 0
        self.begin()

    def begin(self) -> None:
        """Begin another run, which no process has left."""
        self._run += 1
        self._asked, self.exchanges = 0, False

    def decided(self, what: str, decide: Callable[[], str]) -> str:
        """Return rank 0's decision.

        Raises:
            UserError: See `awaited`; this process is at another decision than rank 0.
        """
        if self.rank != 0:
            return self._next(what)["text"]
        answer = decide()
        self._post(what, answer)
        return answer

    def awaited(self, keys: Mapping[int, str], longer: float = 0.0) -> list[str]:
        """Return what processes have written under keys of the store, once all of it is there.

        Args:
            keys: The key of each process.
            longer: Seconds to wait beyond the timeout.

        Raises:
            UserError: A process has left the job because of a mistake.
            LostProcessError: A process has left for another reason, or wrote nothing in time.
        """
        deadline, pause = time.monotonic() + self.timeout + longer, 0.01
        try:
            while not self.store.check(list(keys.values())):
                if self.store.check([self._left()]):
                    left = json.loads(self.store.get(self._left()))
                    self._mark_read()
                    if left["lost"]:
                        raise LostProcessError(f"process {left['rank']}, which has ended: {left['why']}")
                    raise UserError(f"process {left['rank']} has ended: {left['why']}")
                if time.monotonic() > deadline:
                    absent = [str(rank) for rank, key in keys.items() if not self.store.check([key])]
                    which = f"process{'es' if len(absent) > 1 else ''} {', '.join(absent)}"
                    raise LostProcessError(f"{which}, which did not arrive within {self.timeout:g} s")
                time.sleep(pause)
                pause = min(0.25, 1.5 * pause)
            return [bytes(self.store.get(key)).decode() for key in keys.values()]
        except RuntimeError as error:  # also PyTorch's DistNetworkError
            raise LostProcessError(f"process 0, which coordinates the others ({first_line(error)})") from error

    def compare(self, what: str, answer: Callable[[str], str], judge: Callable[[Ask], str]) -> None:
        """Let rank 0 ask all processes until it has found whether they agree.

        Args:
            what: Name of what is compared.
            answer: Returns this process's answer to a question.
            judge: Called on rank 0; returns the difference, or an empty string.

        Raises:
            UserError: They differ; the message is the same in all processes. See also `decided`.
        """
        if self.rank == 0:

            def ask(question: str) -> list[str]:
                self._post(what, question)
                own = answer(question)
                return [own, *self.awaited({rank: self._key(rank) for rank in range(1, self.world)})]

            verdict = judge(ask)
            self._post(_END, verdict)
        else:
            while (question := self._next(what, _END))["kind"] != _END:
                self.store.set(self._key(self.rank), answer(question["text"]))
            verdict = question["text"]
        if verdict:
            self._mark_read()
            raise UserError(verdict)

    def leave(self, why: str, lost: bool, wait: bool = True) -> None:
        """Let the processes that wait for this one end, with the reason.

        Args:
            why: The reason.
            lost: True if the reason is not a mistake of the user.
            wait: If False, rank 0 has ended the others.
        """
        with suppress(RuntimeError):
            if not self.store.check([self._left()]):
                self.store.set(self._left(), json.dumps({"rank": self.rank, "why": why, "lost": lost}))
            self._mark_read(wait)

    def _mark_read(self, wait: bool = True) -> None:
        """Record that this process ends; rank 0, which may have the store, waits for the others to do so."""
        self.store.set(self._left(self.rank), "")
        until = time.monotonic() + GRACE if wait and not self.exchanges else 0.0
        everyone = [self._left(rank) for rank in range(self.world)]
        while self.rank == 0 and time.monotonic() < until and not self.store.check(everyone):
            time.sleep(0.05)

    def _post(self, kind: str, text: str) -> None:
        self._asked += 1
        self.store.set(self._key("question"), json.dumps({"kind": kind, "text": text}))

    def _next(self, *kinds: str) -> dict[str, str]:
        """Return rank 0's next question or decision, which is one of these kinds."""
        self._asked += 1
        question: dict[str, str] = json.loads(self.awaited({0: self._key("question")}, longer=GRACE)[0])
        if question["kind"] not in kinds:
            raise UserError(
                f"process {self.rank} is at {kinds[0]}, but process 0 is at {question['kind']}. Start all processes "
                "with the same command."
            )
        return question

    def _key(self, what: object) -> str:
        return f"run {self._run}/{self._asked}/{what}"

    def _left(self, reader: object = "") -> str:
        return f"run {self._run}/left/{reader}"


_meetings: list[Meeting] = []  # one, kept open: the process group shares the server of rank 0
_REPLY = 10.0
"""Seconds in which a store answers."""


@dataclass(frozen=True)
class Launch:
    """Job whose processes were started by a launcher.

    Attributes:
        rank: Global rank of this process.
        world: Number of processes.
        nodes: Number of machines.
        per_node: Processes per machine, one device each.
        attempt: Number of restarts by torchrun.
    """

    rank: int
    world: int
    nodes: int
    per_node: int
    attempt: int = 0


def launched() -> Launch | None:
    """Return the job of this process, or None if the user or Lightning started it.

    Raises:
        UserError: The machines have different numbers of processes, which Lightning does not support.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:  # first: torchrun can run inside SLURM
        rank, world, per_node = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        nodes = int(env.get("GROUP_WORLD_SIZE", world // per_node))
        job = Launch(rank, world, nodes, per_node, int(env.get("TORCHELASTIC_RESTART_COUNT", "0")))
    elif "SLURM_STEP_ID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):  # inside srun
        world, nodes = int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", "1"))
        job = Launch(int(env.get("SLURM_PROCID", "0")), world, nodes, max(1, world // nodes))
    else:
        return None
    if job.nodes * job.per_node != job.world:
        raise UserError(
            f"{job.world} processes on {job.nodes} machines: start the same number on each, one per device."
        )
    return job if job.world > 1 else None


def process_rank() -> int:
    """Return the rank of this process among processes that report the same errors, from environment variables."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def broadcast_decision(what: str, decide: Callable[[], str]) -> str:
    """Return rank 0's decision in every process; without a job, just call ``decide``.

    All processes request the same decisions in the same order. Only rank 0 calls ``decide``, which may check files that
    it is about to write.

    Raises:
        UserError: See `Meeting.decided`.
    """
    job = launched()
    return decide() if job is None else meeting_of(job).decided(what, decide)


def decide_first(what: str, variable: str, decide: Callable[[], str]) -> str:
    """Return rank 0's decision, also in the processes that Lightning starts after it for further devices.

    Args:
        what: See `broadcast_decision`, also for errors.
        variable: Environment variable by which these processes get it.
        decide: Called on rank 0 only.
    """
    given = os.environ.get(variable)
    if given and launched() is None and int(os.environ.get("LOCAL_RANK", "0")):  # a launcher's may be an old one
        return given

    def remember() -> str:
        os.environ[variable] = answer = decide()
        return answer

    return broadcast_decision(what, remember)


def meeting_of(job: Launch, timeout: float | None = None) -> Meeting:
    """Return the meeting of a job; torchrun or rank 0 hosts its store. Each attempt of a job has its own keys.

    Raises:
        UserError: Another program has the port.
        LostProcessError: The process with the store does not answer.
    """
    if _meetings:
        _meetings[0].timeout = timeout or _meetings[0].timeout
        return _meetings[0]
    timeout = timeout or TIMEOUT
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        cluster = SLURMEnvironment(auto_requeue=False)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    def meet(store: Any) -> Meeting:  # another job may have this port on the same machine
        names = ("TORCHELASTIC_RUN_ID",) if "TORCHELASTIC_RUN_ID" in os.environ else ("SLURM_JOB_ID", "SLURM_STEP_ID")
        name = "-".join(os.environ.get(each, "") for each in names)
        return Meeting(PrefixStore(f"randlora-pl-{name}-{job.attempt}", store), job.rank, job.world, timeout)

    hosted = job.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if hosted:
            store = TCPStore(host, port, None, True, timedelta(seconds=TIMEOUT), False, multi_tenant=True)
        else:
            deadline = time.monotonic() + timeout
            while True:  # PyTorch's own waiting prints frames of C++
                try:
                    socket.create_connection((host, port), _REPLY).close()
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise LostProcessError(f"process 0, which does not answer at {host}:{port}") from error
                    time.sleep(0.2)
            store = _client(host, port)
    except RuntimeError as error:
        if not (busy := busy_port(error)):
            raise
        with suppress(UserError, RuntimeError):  # the others may have joined the store of that program
            meet(_client(host, port)).leave(str(busy), lost=False)
        raise busy from error
    _meetings.append(meet(store))
    return _meetings[0]


def _client(host: str, port: int) -> Any:
    """Return a client of the store at an address, in a thread: PyTorch waits forever for a silent program's reply."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    clients: list[Any] = []

    def connect() -> None:
        with suppress(RuntimeError):
            clients.append(TCPStore(host, port, None, False, timedelta(seconds=_REPLY), False))

    thread = Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_REPLY)
    if not clients:
        raise _busy(host, port)
    return clients[0]


def busy_port(error: BaseException) -> UserError | None:
    """Return the error for a port that another program has, or None for any other error."""
    if "EADDRINUSE" not in str(error) and "already in use" not in str(error):
        return None
    return _busy(os.environ.get("MASTER_ADDR", "this machine"), int(os.environ.get("MASTER_PORT", "0")))


def _busy(host: str, port: int) -> UserError:
    return UserError(f"another program has port {port} of {host}. Set a free one in all processes: MASTER_PORT=PORT.")


def join(store: Any, rank: int, world: int, timeout: float) -> Meeting:
    """Return the meeting of processes without a launcher, whose process group has a store."""
    if not _meetings:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        _meetings.append(Meeting(PrefixStore("randlora-pl", store), rank, world, timeout))
    return _meetings[0]


@contextmanager
def parting() -> Iterator[None]:
    """Hold one run: let the other processes of the job end with this one if an error ends it."""
    for known in _meetings:
        known.begin()
    try:
        yield
    except Exception as error:
        with suppress(UserError, LostProcessError, KeyboardInterrupt):  # torchrun may end this process now
            job = launched()
            meeting = next(iter(_meetings), None) or (None if job is None else meeting_of(job, GRACE))
            if meeting is not None:
                meeting.leave(first_line(error), lost=not isinstance(error, UserError), wait=job is not None)
        raise


_ALONE = (
    "config.", "run.", "data.root.", "data.num_workers.", "data.cache_images.", "ckpt_path.",
    "data.shots_file.", "data.classnames.", "data.templates.", "trainer.devices.", "trainer.num_nodes.",
    "trainer.logger.", "trainer.profiler.", "trainer.default_root_dir.", "trainer.enable_progress_bar.",
)  # fmt: skip
"""Options that may differ: places, devices, workers, caches, loggers, and files whose content is compared."""
Options = dict[str, tuple[str, Any]]
"""What must be equal, as text, and what a message prints, by option."""


def common_options(flat: Mapping[str, Any]) -> Options:
    """Return the options that all processes must have in common; existing paths may differ."""
    kept = {name: value for name, value in flat.items() if not f"{name}.".startswith(_ALONE)}
    return {f"--{name}": (json.dumps(_placeless(v), sort_keys=True, default=str), v) for name, v in kept.items()}


def _placeless(value: Any) -> Any:
    """Return a value with existing paths replaced."""
    if isinstance(value, dict):
        return {name: _placeless(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_placeless(each) for each in value]
    with suppress(OSError, ValueError, RuntimeError):  # not every text can be a path
        if isinstance(value, str) and os.sep in value and Path(value).expanduser().exists():
            return "a path"
    return value


def check_options(meeting: Meeting, options: Options) -> None:
    """Refuse processes with different options, see `Meeting.compare`."""
    own = json.dumps(options, default=str)

    def judge(ask: Ask) -> str:
        first, *others = (json.loads(text) for text in ask(""))
        none = "null", None
        for rank, other in enumerate(others, 1):
            pairs = [(name, first.get(name, none), other.get(name, none)) for name in sorted({*first, *other})]
            different = [
                f"{name} is {brief(ours[1])} in process 0, {brief(theirs[1])} in process {rank}"
                for name, ours, theirs in pairs
                if ours[0] != theirs[0]
            ]
            if different:
                return f"{'; '.join(different[:3])}. Give all processes the same options."
        return ""

    meeting.compare("the options", lambda question: own, judge)
