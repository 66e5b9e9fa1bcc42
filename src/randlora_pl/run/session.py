"""One run from its words to its results; every error becomes a message."""

import shlex
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.run.command import adapter_of, folders_in, prepare, resume_by_itself
from randlora_pl.run.error_messages import (
    build_error,
    file_trouble,
    full_disk,
    lost_process,
    lost_worker,
    memory_advice,
    out_of_memory,
)
from randlora_pl.run.options.choices import check_here
from randlora_pl.run.options.compose import Command
from randlora_pl.run.parallel.launch import parting, process_rank
from randlora_pl.run.run_folder import check_run, locked, results_of
from randlora_pl.utils.errors import DryRunEnd, LostProcessError, Terminated, UserError
from randlora_pl.utils.own_classes import import_words
from randlora_pl.utils.run_files import CONFIG, LAST
from randlora_pl.utils.text import log_to_file, log_to_terminal, print_above_progress, silence_library_warnings

if TYPE_CHECKING:
    from randlora_pl.run.lightning_cli import App


@parting()
def run_fit(words: Sequence[str]) -> "App":
    """Run ``fit`` with the words behind it: zero-shot test, training, test, results. Return the finished run.

    Raises:
        UserError: A typed option does not fit; also the errors of `handle_run_errors`.
    """
    silence_library_warnings()
    typed = list(words)
    args = [word for word in typed if word not in ("--dry-run", "--dry_run")]
    dry = len(args) < len(typed)
    if valued := next((word for word in args if word.startswith(("--dry-run=", "--dry_run="))), None):
        raise UserError(f"--dry-run takes no value, not {valued}. Type --dry-run")
    auto = folders_in(args, ("resume",)).get("resume") == Path("auto")
    args = resume_by_itself(args)
    folder = folders_in(args, ("resume",)).get("resume")
    if dry and folder is not None:
        raise UserError(f"--dry-run writes nothing, so it cannot resume {folder}. Remove --resume, or --dry-run.")
    with ExitStack() as held:
        if folder is not None:  # before any file of it is read, which another process may be writing
            check_run(folder)
            if auto and results_of(folder).get("finished"):
                app = start(prepare("fit", args), folder)
                from randlora_pl.run.fit_results import end_page

                if process_rank() == 0:
                    line = f"{folder} is finished: this command changes nothing. To train again, remove --resume."
                    print_above_progress(line, *end_page(folder, app.task, app.datamodule.unit))
                return app
            lock = held.enter_context(locked(folder))
        app = start(prepare("fit", args), folder, dry)
        if dry:
            with handle_run_errors(app):
                app.trainer.fit(app.model, app.datamodule)  # StartSummary ends it
            return app
        if folder is None:
            lock = held.enter_context(locked(app.folder))
        from randlora_pl.run.stages import fit

        with handle_run_errors(app):
            fit(app, lock)
    return app


@parting()
def run_evaluation(verb: str, words: Sequence[str]) -> "App":
    """Run ``validate`` or ``test`` with the words behind it: metrics of an adapter, or of the pretrained model."""
    silence_library_warnings()
    command = prepare(verb, list(words))
    app = start(command)
    from randlora_pl.run.stages import evaluate

    with handle_run_errors(app):
        evaluate(app, adapter_of(command))
    return app


def start(command: Command, folder: Path | None = None, dry: bool = False) -> "App":
    """Check what a command needs here, import the heavy libraries and build task, data and trainer; see `App`.

    Raises:
        UserError: See `check_here`; a typed option does not fit.
    """
    check_here(command)
    if "--help-all" in command.typed:
        command.typed = ["--help"]
    log_to_terminal()
    from randlora_pl.run.lightning_cli import App

    return App(command, folder, dry=dry)


@contextmanager
def handle_run_errors(app: "App") -> Iterator[None]:
    """Turn errors of a run into one-line messages, and write ``run.log``.

    Raises:
        UserError: Bad input, or memory ran out, or the disk is full.
        LostProcessError: Another process of the job, or a data loader worker, is gone.
        KeyboardInterrupt: With the command to resume; `Terminated` after SIGTERM.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    usual = threading.excepthook  # of TensorBoard: the training raises the error of a full disk, too
    threading.excepthook = lambda args: None if args.exc_value and full_disk(args.exc_value) else usual(args)
    try:
        with nullcontext() if app.dry else log_to_file(app.folder / "run.log"):
            yield
    except DryRunEnd:
        return
    except UserError:
        app.discard()
        # end the processes that Lightning has started, which would wait for this one or repeat its message
        getattr(app.trainer.strategy.launcher, "kill", lambda number: None)(signal.SIGTERM)
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        ended = any(isinstance(one, SIGTERMException | Terminated) for one in (stop, stop.__context__))
        if isinstance(stop, SystemExit) and not ended and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        raise (Terminated if ended else KeyboardInterrupt)(_how_to_resume(app)) from None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        of_lightning = isinstance(error, ValueError) and "lightning" in Path(frames[-1].filename).parts
        if of_lightning or type(error).__name__ == "MisconfigurationException":  # about how Lightning is set up
            app.discard()
            raise build_error(error) from error
        if app.trainer.world_size > 1 and lost_process(error):
            raise LostProcessError(f"another process of the job; {_how_to_resume(app)}") from error
        if worker := lost_worker(error):
            hint = "out of memory? Try fewer --data.num_workers"
            raise LostProcessError(f"a data loader worker ({worker}; {hint}); {_how_to_resume(app)}") from error
        if full := full_disk(error):
            raise UserError(f"{full}. Free some space there; {_how_to_resume(app)}") from error
        if not out_of_memory(error):
            if file_trouble(error):  # main prints it
                app.discard()
            raise
        data: Any = app.datamodule
        accumulate = app.trainer.accumulate_grad_batches
        advice = memory_advice(data.batch_size, accumulate, app.trainer.state.fn or "fit", data.eval_batch_size)
        app.discard()
        raise UserError(advice) from error
    finally:
        threading.excepthook = usual


def _how_to_resume(app: "App") -> str:
    if app.dry:  # it has no folder
        return ""
    resume = f"randlora-pl fit --resume {shlex.quote(str(app.folder))}{import_words()}"
    if app.command.verb == "fit" and (app.folder / LAST).is_file():
        return f"resume with: {resume}"
    app.discard()
    if app.command.verb != "fit":
        return ""
    again = f"; start it again with: {resume}"
    return "no checkpoint has been written yet" + (again if (app.folder / CONFIG).is_file() else "")
