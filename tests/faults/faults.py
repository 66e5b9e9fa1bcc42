"""What goes wrong in a process, and where: each fault waits for the n-th time that a place is reached."""

import contextlib
import fnmatch
import multiprocessing
import os
import pkgutil
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Action = Callable[[], None]
_STEPS = {
    "optimizer": ("torch.optim:AdamW", "step"),
    "projection": ("randlora_pl.adapters.methods.full", "leading_vectors"),
    "pruning": ("randlora_pl.adapters.methods.adalora:Pruning", "_prune"),
    "search": ("randlora_pl.data.module:ImageData", "search_batch"),
}
"""Places in steps, beside those of the task: owner and name of what is called there."""


@dataclass(frozen=True)
class Fault:
    """An action at the ``number``-th time that ``place`` is reached.

    Attributes:
        place: ``training``, ``validation``, ``test`` or one of `_STEPS` (before such a step); or what is done to a file
            in the run folder and a pattern of its path, such as ``open checkpoints/.last.ckpt.part``, ``rename
            .results.json.part``, ``mkdir .adapter.part*``, ``remove *`` or ``* *``, before it is done.
        number: From 1 on.
    """

    place: str
    number: int

    def act(self) -> None:
        """What goes wrong."""
        raise NotImplementedError

    def install(self) -> None:
        """In the process in which it shall go wrong."""
        count = 0

        def reached() -> None:
            nonlocal count
            count += 1
            if count == self.number:
                self.act()

        if " " in self.place:
            _before_files(*self.place.split(" "), reached)
        else:
            _before_step(self.place, reached)


def _before_step(place: str, reached: Action) -> None:
    where, name = _STEPS.get(place, ("randlora_pl.tasks:AdaptationModule", f"{place}_step"))
    owner = pkgutil.resolve_name(where)
    plain = getattr(owner, name)

    def step(*args: Any, **options: Any) -> Any:
        reached()
        return plain(*args, **options)

    setattr(owner, name, step)


def _before_files(wanted: str, pattern: str, reached: Action) -> None:
    """Python tells what it is about to do to which file; that of Rust and C++ is not told."""
    kinds = {"open": "open", "os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "remove"}
    kinds["shutil.rmtree"] = "remove"

    def audit(event: str, args: tuple[Any, ...]) -> None:
        kind = kinds.get(event)
        if kind is None or wanted not in ("*", kind) or not isinstance(args[0], str | bytes | os.PathLike):
            return
        if kind == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        _, runs, path = os.fsdecode(args[0]).rpartition("runs/")
        path = path.split("/", 2)[-1]  # without name and time of the run
        if runs and not path.startswith("tensorboard") and fnmatch.fnmatch(path, pattern):
            reached()

    sys.addaudithook(audit)


@dataclass(frozen=True)
class Signal(Fault):
    """The process gets a signal."""

    signals: tuple[signal.Signals, ...] = (signal.SIGKILL,)
    group: bool = False

    def act(self) -> None:
        for number in self.signals:
            if self.group:
                os.killpg(os.getpid(), number)
            else:
                os.kill(os.getpid(), number)


@dataclass(frozen=True)
class Cut(Fault):
    """The next file that is written is cut off after so many bytes, and the process dies by the signal for that."""

    size: int = 0

    def act(self) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        _no_file_larger_than(self.size)


@dataclass(frozen=True)
class NoLarge(Fault):
    """From here on no file may be larger."""

    size: int = 0

    def act(self) -> None:
        _no_file_larger_than(self.size)


def _no_file_larger_than(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@dataclass(frozen=True)
class Fill(Fault):
    """The disk is full from here on, but for some bytes."""

    ballast: str = ""
    room: int = 0

    def act(self) -> None:
        with Path(self.ballast).open("wb", buffering=0) as file:
            for size in (2**16, 2**12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
            file.truncate(max(0, file.tell() - self.room))


@dataclass(frozen=True)
class KillWorker(Fault):
    """A process that prepares batches is killed."""

    def act(self) -> None:
        pid = multiprocessing.active_children()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Spoil(Fault):
    """One pixel of the batch that is trained on is no number."""

    def install(self) -> None:
        from randlora_pl.tasks import AdaptationModule

        plain, count = AdaptationModule.training_step, 0

        def step(task: Any, batch: dict[str, Any], batch_idx: int) -> Any:
            nonlocal count
            count += 1
            if count == self.number:
                batch["image"][0, 0, 0, 0] = float("nan")
            return plain(task, batch, batch_idx)

        AdaptationModule.training_step = step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Diary(Fault):
    """No fault: keeps in files beside the runs where the process is, and which checkpoints were finished."""

    place: str = "diary"
    number: int = 0

    def install(self) -> None:
        from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
        from lightning.pytorch.loops.fit_loop import _FitLoop

        from randlora_pl.run import stages
        from randlora_pl.run.callbacks import RunCheckpoint, checkpoint

        where = os.open("where.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        finished = os.open("finished.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        stack = ["start"]

        def go(name: str) -> None:
            os.pwrite(where, f"{name:20}".encode(), 0)

        def around(owner: Any, attribute: str, name: Callable[[Any], str], then: Callable[..., None]) -> None:
            plain = getattr(owner, attribute)

            def inside(*args: Any, **options: Any) -> Any:
                stack.append(name(args[0]))
                go(stack[-1])
                try:
                    result = plain(*args, **options)
                finally:
                    stack.pop()
                    go(stack[-1])
                then(*args)
                return result

            static = isinstance(owner, type) and isinstance(owner.__dict__.get(attribute), staticmethod)
            setattr(owner, attribute, staticmethod(inside) if static else inside)

        def nothing(*_: Any) -> None: ...

        def saved(callback: Any, trainer: Any, task: Any) -> None:
            os.write(finished, f"{trainer.global_step}\n".encode())

        around(_FitLoop, "run", lambda _: "training", nothing)
        around(_EvaluationLoop, "run", lambda loop: "test" if loop.trainer.testing else "validation", nothing)
        around(RunCheckpoint, "_save_last", lambda _: "checkpoint", saved)
        around(checkpoint, "save_adapter_of", lambda _: "adapter", nothing)
        around(stages, "write_config", lambda _: "config", nothing)
        around(stages, "write_results", lambda _: "results", nothing)


def hidden(folder: Path) -> list[str]:
    """Temporary files and folders of a run; the lock of a killed process stays until it is taken over."""
    paths = (path for path in folder.rglob(".*") if not path.name.startswith(".lock"))
    return sorted(str(path.relative_to(folder)) for path in paths)
