"""One run: from a checked command to built objects, with every error in words."""

import copy
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.config.adapter_config import adapter_config, config_beside, data_beside
from randlora_pl.config.compose import DEFAULTS, FOLDER_OPTIONS, Command, compose, merge, normalise, read_config
from randlora_pl.config.validate import check_names
from randlora_pl.engine.error_messages import (
    build_error,
    complaint_of_lightning,
    full_disk,
    lost_process,
    lost_worker,
    memory_advice,
    out_of_memory,
)
from randlora_pl.engine.run_folder import check_architecture, check_run, newest_unfinished, planned_name, tested_adapter
from randlora_pl.parallel.launch import broadcast_decision
from randlora_pl.utils.errors import LostProcessError, Terminated, UserError
from randlora_pl.utils.files.run_files import ADAPTER, CONFIG, LAST

if TYPE_CHECKING:
    from randlora_pl.engine.lightning_cli import App
from randlora_pl.utils.text.log_filters import silence_library_warnings


def prepare(verb: str, args: list[str]) -> Command:
    """The checked command; what a run or an adapter folder says comes before everything that was typed.

    The config of a run (``--run``, ``--resume``) is trusted whole; beside an adapter only data options are read.

    Raises:
        UserError: See `compose` and `check_names`.
    """
    folders = _folders(args, FOLDER_OPTIONS[verb])
    _check_checkpoint_option(verb, args, folders)
    defaults, words = copy.deepcopy(DEFAULTS), list(args)
    typed_config = bool({"-c", "--config"} & {word.partition("=")[0] for word in args})
    if "resume" in folders:
        words = ["--config", str(check_run(folders["resume"])), *words]
    elif "run" in folders:
        words = ["--config", str(check_run(folders["run"])), *words]
        if not (folders["run"] / ADAPTER).is_dir():
            place = shlex.quote(str(folders["run"]))
            raise UserError(f"{folders['run']} is not finished: randlora-pl fit --resume {place}")
    beside = config_beside(folders["adapter"]) if "adapter" in folders and not typed_config else None
    if beside is not None:
        defaults = merge(defaults, data_beside(beside))
    command = compose(verb, words, defaults)
    if beside is not None:
        command.named.append(str(beside))
    if verb != "fit":
        command.config.pop("ckpt_path", None)  # where the run's training started from
    adapter = adapter_of(command)
    if adapter is not None:  # the folder knows best what it needs
        saved = adapter_config(adapter)
        command.config = merge(command.config, normalise(saved))
        check_architecture(command, saved, adapter)
    elif "resume" in folders:
        check_architecture(command, read_config(folders["resume"] / CONFIG), folders["resume"])
    check_names(command)
    return command


def _resume_by_itself(args: list[str]) -> list[str]:
    """``--resume auto`` as the folder of the newest run of this name, if it is unfinished, or without it.

    A job that is started again has the same command line, so that the run's own config holds all of it.
    """
    if _folders(args, ("resume",)).get("resume") != Path("auto"):
        return args
    words = list(args)
    place = next(number for number, word in enumerate(words) if word.partition("=")[0] == "--resume")
    del words[place : place + (1 if "=" in words[place] else 2)]
    flat = compose("fit", words, copy.deepcopy(DEFAULTS)).flat()
    root, name = Path(str(flat.get("run.root", "runs"))), str(flat.get("run.name") or planned_name(flat))
    found = broadcast_decision("resume", lambda: str(newest_unfinished(root, name) or ""))
    return ["--resume", found] if found else words


def _check_checkpoint_option(verb: str, args: list[str], folders: dict[str, Path]) -> None:
    if not any(word.partition("=")[0] == "--ckpt_path" for word in args):
        return
    if verb != "fit":
        raise UserError(f"{verb} takes no --ckpt_path: name an adapter folder (--adapter) or a run (--run) instead.")
    if "resume" in folders:
        raise UserError("--resume goes on from the run's own checkpoint: leave out --ckpt_path, or leave out --resume.")


def _folders(args: list[str], names: tuple[str, ...]) -> dict[str, Path]:
    found = {}
    for place, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:] in names and (equals or place + 1 < len(args)):
            found[option[2:]] = Path(value if equals else args[place + 1])
    return found


def adapter_of(command: Command) -> Path | None:
    """The adapter folder that ``--adapter`` or ``--run`` names."""
    if "adapter" in command.folders:
        return command.folders["adapter"]
    return tested_adapter(command.folders["run"]) if "run" in command.folders else None


def start(command: Command, folder: Path | None) -> "App":
    """Imports the heavy libraries and builds task, data and trainer.

    Raises:
        UserError: Something that was typed does not fit.
    """
    silence_library_warnings()
    if "--help-all" in command.typed:
        command.typed = ["--help"]
    from randlora_pl.utils.text.console import log_to_terminal

    log_to_terminal()
    from randlora_pl.engine.lightning_cli import App

    return App(command, folder)


@contextmanager
def guarded(app: "App") -> Iterator[None]:
    """Everything that can go wrong in a run, in words; and the log file of the run.

    Raises:
        UserError: Bad input, or memory ran out, or the disk is full.
        LostProcessError: Another process of the job, or one that prepares batches, is gone.
        KeyboardInterrupt: With how to go on; `Terminated` after SIGTERM.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from randlora_pl.utils.text.console import log_to_file

    try:
        with log_to_file(app.folder / "run.log"), full_disk_is_told_once():
            yield
    except UserError:
        app.discard()
        _end_the_others(app)
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        ended = any(isinstance(one, SIGTERMException | Terminated) for one in (stop, stop.__context__))
        if isinstance(stop, SystemExit) and not ended and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise (Terminated if ended else KeyboardInterrupt)(_how_to_resume(app)) from None
    except Exception as error:
        if complaint_of_lightning(error):
            app.discard()
            raise build_error(error) from error
        if app.trainer.world_size > 1 and lost_process(error):
            raise LostProcessError(f"another process of the job; {_how_to_resume(app)}") from error
        if worker := lost_worker(error):
            hint = "out of memory? take fewer --data.num_workers"
            raise LostProcessError(f"a data loader worker ({worker}; {hint}); {_how_to_resume(app)}") from error
        if full := full_disk(error):
            raise UserError(f"{full}. Make room there; {_how_to_resume(app)}") from error
        if not out_of_memory(error):
            raise
        data: Any = app.datamodule
        accumulate = app.trainer.accumulate_grad_batches
        advice = memory_advice(data.batch_size, accumulate, app.trainer.state.fn or "fit", data.eval_batch_size)
        app.discard()
        raise UserError(advice) from error


@contextmanager
def full_disk_is_told_once() -> Iterator[None]:
    """Without the traceback of TensorBoard's thread; what it met comes up in the training, too."""
    told = threading.excepthook
    threading.excepthook = lambda args: None if args.exc_value and full_disk(args.exc_value) else told(args)
    try:
        yield
    finally:
        threading.excepthook = told


def _end_the_others(app: "App") -> None:
    """Ends the processes that Lightning has started, which would wait for this one or repeat what it says."""
    kill = getattr(app.trainer.strategy.launcher, "kill", None)
    if kill is not None:
        kill(signal.SIGTERM)


def _how_to_resume(app: "App") -> str:
    if app.command.verb == "fit" and (app.folder / LAST).is_file():
        return f"go on with: randlora-pl fit --resume {shlex.quote(str(app.folder))}"
    app.discard()
    if app.command.verb != "fit":
        return ""
    again = f"; start it again with: randlora-pl fit --resume {shlex.quote(str(app.folder))}"
    return "no checkpoint was written yet" + (again if (app.folder / CONFIG).is_file() else "")
