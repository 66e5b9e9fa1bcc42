"""The checked command of a run: typed options over the config of a run or the data options beside an adapter."""

import copy
from pathlib import Path

from randlora_pl.run.first_stage import compose_fit, has_config
from randlora_pl.run.options.adapter_config import (
    adapter_config,
    check_run_config,
    config_beside,
    data_beside,
    import_classes,
)
from randlora_pl.run.options.choices import choose_dataset
from randlora_pl.run.options.compose import (
    DEFAULTS,
    FOLDER_OPTIONS,
    Command,
    compose,
    folder_of,
    merge,
    normalize,
    read_config,
    underscored,
)
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.run.parallel.launch import broadcast_decision
from randlora_pl.run.run_folder import check_architecture, check_run, planned_name, run_to_resume
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.run_files import CONFIG, find_adapter


def prepare(verb: str, args: list[str]) -> Command:
    """Return the checked command: typed options over the config of a run or adapter folder.

    The config of a run (``--run``, ``--resume``) names classes of this program and Lightning, and others that the user
    has imported; beside an adapter only data options are read.

    Raises:
        UserError: See `compose` and `check_names`.
    """
    args = list(map(underscored, args))
    folders = folders_in(args, FOLDER_OPTIONS[verb])
    _check_start_options(verb, args, folders)
    import_classes(compose(verb, args, {}))  # before a file that is not the user's is read
    defaults, words = copy.deepcopy(DEFAULTS), list(args)
    if "resume" in folders:
        words = ["--config", str(check_run_config(check_run(folders["resume"]))), *words]
    elif "run" in folders:
        words = ["--config", str(check_run_config(check_run(folders["run"]))), *words]
        find_adapter(folders["run"])  # raises the error of a run without one
    beside = config_beside(folders["adapter"]) if "adapter" in folders and not has_config(args) else None
    if beside is not None:
        defaults = merge(defaults, data_beside(beside))
    own = verb != "fit" or "resume" in folders
    command = compose(verb, words, defaults) if own else compose_fit(words, defaults)
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
    if folders_in(args, ("resume",)).get("resume") != Path("auto"):
        return args
    words = list(args)
    place = next(number for number, word in enumerate(words) if word.partition("=")[0] == "--resume")
    del words[place : place + (1 if "=" in words[place] else 2)]
    command = compose("fit", words, copy.deepcopy(DEFAULTS))
    flat = command.flat()
    if not flat.get("run.name"):  # with a name, the LoRA that the run starts from may be gone, or have the same name
        flat = compose_fit(words).flat()
    root, name = Path(str(flat.get("run.root", "runs"))), str(flat.get("run.name") or planned_name(flat))
    found = broadcast_decision("--resume auto", lambda: str(run_to_resume(root, name, command.checksum()) or ""))
    return ["--resume", found] if found else words


def _check_start_options(verb: str, args: list[str], folders: dict[str, Path]) -> None:
    """Refuse options that say what a training starts from, where another option or the command does."""
    typed = {word.partition("=")[0].replace("from_", "from-") for word in args}
    found = [option for option in ("--ckpt_path", "--from-adapter", "--from-form") if option in typed]
    if found and verb != "fit":
        raise UserError(
            f"{verb} does not support {found[0]}. Name an adapter folder (--adapter) or a run (--run) instead."
        )
    if found and "resume" in folders:
        raise UserError(f"--resume uses the run's own checkpoint. Remove {found[0]}, or remove --resume.")


def folders_in(args: list[str], names: tuple[str, ...]) -> dict[str, Path]:
    """Return the folders that options such as ``--resume FOLDER`` name, by option."""
    found = {}
    for index, word in enumerate(args):
        option, equals, value = word.partition("=")
        if option.startswith("--") and option[2:] in names and (equals or index + 1 < len(args)):
            found[option[2:]] = folder_of(option[2:], value if equals else args[index + 1])
    return found


def adapter_of(command: Command) -> Path | None:
    """Return the adapter folder that ``--adapter`` or ``--run`` names."""
    if "adapter" in command.folders:
        return command.folders["adapter"]
    return find_adapter(command.folders["run"]) if "run" in command.folders else None
