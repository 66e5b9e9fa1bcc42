"""One run, from the command line to its results: checks of the command, and errors as messages."""

import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from randlora_pl.run.options.classes import class_name, method_with, own_task
from randlora_pl.run.options.compose import (
    DEFAULTS,
    FOLDER_OPTIONS,
    Command,
    Tree,
    compose,
    folder_of,
    merge,
    normalize,
    planned_name,
    read_config,
    underscored,
)
from randlora_pl.run.options.mistakes import check_here, check_names, choose_dataset
from randlora_pl.run.options.saved_config import (
    adapter_config,
    check_architecture,
    check_run,
    check_run_config,
    config_beside,
    data_beside,
    import_classes,
)
from randlora_pl.run.parallel.launch import broadcast_decision, parting, process_rank
from randlora_pl.run.run_folder import find_lora, locked, run_to_resume
from randlora_pl.utils.errors import (
    DryRunEnd,
    LostProcessError,
    Terminated,
    UserError,
    build_error,
    file_trouble,
    full_disk,
    lost_process,
    lost_worker,
    memory_advice,
    out_of_memory,
)
from randlora_pl.utils.run_files import CONFIG, LAST, find_adapter, results_of, resume_command
from randlora_pl.utils.text import log_to_file, log_to_terminal, print_above_progress, silence_library_warnings

if TYPE_CHECKING:
    from randlora_pl.run.lightning_cli import App


def _compose_fit(words: list[str], defaults: Tree = DEFAULTS) -> Command:
    """Return the command of ``fit``; with a LoRA to start from, its options are defaults.

    The config next to the LoRA is not read if the words name a config.
    """
    command = compose("fit", words, defaults)
    start = command.flat().get("from_adapter")
    if start is None:
        return command
    adapter = find_lora(str(start))
    saved, flat = normalize(adapter_config(adapter)), compose("fit", words, {}).flat()
    options, task = saved["model"]["init_args"], saved["model"]["class_path"]
    method = options["adapter"]["class_path"].rpartition(".")[2]
    starts = method == method_with("starts_stage", True)
    if not starts or not _from_lora(task):
        what = "LoRA with learned prompts" if starts else method
        raise UserError(
            f"{adapter} is {what}, and a stage can only start from LoRA. Train one first: randlora-pl fit "
            "--config CONFIG --model.adapter LoRA"
        )
    other = class_name("model", flat.get("model", task)) or task
    if other != task:  # its head would not be the LoRA's
        train = f", or train a LoRA of it first: randlora-pl fit --config CONFIG --model {other} --model.adapter LoRA"
        raise UserError(
            f"{adapter} is a LoRA of {task}, not of {other}. Remove --model or the config that sets it"
            + (train if _from_lora(other) else ".")  # a LoRA with prompts is an error, too
        )
    if (name := flat.get("model.name", options.get("name"))) != options.get("name"):
        raise UserError(
            f"{adapter} is a LoRA of {options.get('name')}, not of {name}. Remove --model.name, or train a LoRA of it "
            f"first: randlora-pl fit --config CONFIG --model.name {name} --model.adapter LoRA"
        )
    own = ("adapter", "learning_rate", "head_learning_rate")  # of the LoRA's own training
    options = {name: value for name, value in options.items() if name not in own}
    known = saved | {"model": saved["model"] | {"init_args": options}}
    if not command.named and (beside := config_beside(adapter)) is not None:
        known = merge(known, normalize(data_beside(beside)))
    return compose("fit", words, merge(defaults, known))


def _from_lora(task: str) -> bool:
    """Return True if a task may start from a LoRA, as any from outside."""
    return (kind := own_task(task)) is None or kind.from_lora


def prepare(verb: str, args: list[str]) -> Command:
    """Return the checked command: typed options over the config of a run or adapter folder.

    The config of a run (``--run``, ``--resume``) names classes of this program and Lightning, and others that the user
    has imported; next to an adapter only data options are read.

    Raises:
        UserError: An option does not fit the verb; see also `compose` and `check_names`.
    """
    args = list(map(underscored, args))
    folders = _folders_in(args, FOLDER_OPTIONS[verb])
    typed = {word.partition("=")[0].replace("from_", "from-") for word in args}
    starts = [option for option in ("--ckpt_path", "--from-adapter", "--from-form") if option in typed]
    if starts and verb != "fit":
        raise UserError(
            f"{verb} does not support {starts[0]}. Give an adapter folder (--adapter) or a run (--run) instead."
        )
    if starts and "resume" in folders:
        raise UserError(f"--resume uses the run's own checkpoint. Remove {starts[0]}, or remove --resume.")
    users = compose(verb, args, {})
    import_classes(users)  # before a file that is not the user's is read
    defaults, words = DEFAULTS, list(args)
    if run := folders.get("resume") or folders.get("run"):
        words = ["--config", str(check_run_config(check_run(run))), *words]
    if "run" in folders:
        find_adapter(folders["run"])  # raises the error of a run without one
    beside = config_beside(folders["adapter"]) if "adapter" in folders and not users.named else None
    if beside is not None:
        defaults = merge(defaults, data_beside(beside))
    own = verb != "fit" or "resume" in folders
    command = compose(verb, words, defaults) if own else _compose_fit(words, defaults)
    if beside is not None:
        command.named.append(str(beside))
    if verb != "fit":
        for option in ("ckpt_path", "from_adapter", "from_form"):  # that the run's training started from
            command.config.pop(option, None)
    adapter = adapter_of(command)
    if adapter is not None:  # the folder's own config decides about model and data
        saved = adapter_config(adapter)
        command.config = merge(command.config, normalize(saved))
        check_architecture(command, saved, adapter)
    elif "resume" in folders:
        check_architecture(command, read_config(folders["resume"] / CONFIG), folders["resume"])
    choose_dataset(command)
    check_names(command)
    return command


def resume_by_itself(args: list[str]) -> list[str]:
    """Replace ``--resume auto`` by the run that it continues (`run_to_resume`); without one, remove it.

    A job that is started again has the same command line, so that the run's own config holds all of it.
    """
    if _folders_in(args, ("resume",)).get("resume") != Path("auto"):
        return args
    words = list(args)
    place = next(number for number, word in enumerate(words) if word.partition("=")[0] == "--resume")
    del words[place : place + (1 if "=" in words[place] else 2)]
    command = compose("fit", words, DEFAULTS)
    flat = command.flat()
    if not flat.get("run.name"):  # with a name, the LoRA that the run starts from may be gone, or have the same name
        flat = _compose_fit(words).flat()
    root, name = Path(str(flat.get("run.root", "runs"))), str(flat.get("run.name") or planned_name(flat))
    run = broadcast_decision("--resume auto", lambda: str(run_to_resume(root, name, command.checksum()) or ""))
    return ["--resume", run] if run else words


def _folders_in(args: list[str], names: tuple[str, ...]) -> dict[str, Path]:
    """Return the folders that options such as ``--resume FOLDER`` name, by option."""
    folders = {}
    for index, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:] in names and (equals or index + 1 < len(args)):
            folders[option[2:]] = folder_of(option[2:], value if equals else args[index + 1])
    return folders


def adapter_of(command: Command) -> Path | None:
    """Return the adapter folder that ``--adapter`` or ``--run`` names."""
    if "adapter" in command.folders:
        return command.folders["adapter"]
    return find_adapter(command.folders["run"]) if "run" in command.folders else None


@parting()
def run_fit(words: Sequence[str]) -> "App":
    """Run ``fit`` with the words after it: zero-shot test, training, test, results. Return the finished run.

    Raises:
        UserError: A typed option does not fit; also the errors of `handle_run_errors`.
    """
    silence_library_warnings()
    typed = list(words)
    args = [word for word in typed if word not in ("--dry-run", "--dry_run")]
    dry = len(args) < len(typed)
    if valued := next((word for word in args if word.startswith(("--dry-run=", "--dry_run="))), None):
        raise UserError(f"--dry-run takes no value, not {valued}. Type --dry-run")
    auto = _folders_in(args, ("resume",)).get("resume") == Path("auto")
    args = resume_by_itself(args)
    folder = _folders_in(args, ("resume",)).get("resume")
    if dry and folder is not None:
        raise UserError(f"--dry-run writes nothing, so it cannot resume {folder}. Remove --resume, or --dry-run.")
    with ExitStack() as held:
        if folder is not None:  # before any file of it is read, which another process may be writing
            check_run(folder)
            if auto and results_of(folder).get("finished"):
                app = start(prepare("fit", args), folder)
                from randlora_pl.run.callbacks.summary import end_page

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
    """Run ``validate`` or ``test`` with the words after it: metrics of an adapter, or of the pretrained model."""
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
        data, accumulate = app.datamodule, app.trainer.accumulate_grad_batches
        advice = memory_advice(data.batch_size, accumulate, app.trainer.state.fn or "fit", data.eval_batch_size)
        app.discard()
        raise UserError(advice) from error
    finally:
        threading.excepthook = usual


def _how_to_resume(app: "App") -> str:
    if app.dry:  # it has no folder
        return ""
    resume = resume_command(app.folder)
    if app.command.verb == "fit" and (app.folder / LAST).is_file():
        return f"resume with: {resume}"
    app.discard()
    if app.command.verb != "fit":
        return ""
    again = f"; start it again with: {resume}"
    return "no checkpoint has been written yet" + (again if (app.folder / CONFIG).is_file() else "")
