"""The checked command of a run: typed options over the config of a run or the data options beside an adapter.

With ``--from-adapter``, the base model, layers and data of the LoRA that a training starts from are the defaults.
"""

import copy
from pathlib import Path

from randlora_pl.run.options.adapter_config import (
    adapter_config,
    check_run_config,
    config_beside,
    data_beside,
    import_classes,
)
from randlora_pl.run.options.choices import choose_dataset
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
    read_config,
    underscored,
)
from randlora_pl.run.options.mistakes import check_names
from randlora_pl.run.parallel.launch import broadcast_decision, decide_first
from randlora_pl.run.run_folder import check_architecture, check_run, planned_name, run_to_resume
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.run_files import CONFIG, find_adapter


def find_lora(start: str) -> Path:
    """Return the LoRA that rank 0 finds: when the others look, the newest run of a name may be the new one itself.

    Raises:
        UserError: See `find_adapter`; also the errors of `decide_first`.
    """

    def find() -> str:
        found = find_adapter(start)
        return str(found.resolve() if found.exists() else found)  # a missing one is named as it was typed

    return Path(decide_first("--from-adapter", "RANDLORA_PL_FROM_ADAPTER", find))


def compose_fit(words: list[str], defaults: Tree | None = None) -> Command:
    """Return the command of ``fit``; with a LoRA to start from, its options are defaults.

    Args:
        words: The words behind ``fit``. With a config among them, the one beside the LoRA is not read.
        defaults: Config that the LoRA's options and then the first config file are merged into.

    Raises:
        UserError: See `compose`; the LoRA is missing, is another method, or is of another model.
    """
    defaults = copy.deepcopy(DEFAULTS) if defaults is None else defaults
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
        found = "LoRA with learned prompts" if starts else method
        raise UserError(
            f"{adapter} is {found}, and a stage starts from LoRA alone. Train one first: randlora-pl fit "
            "--config CONFIG --model.adapter LoRA"
        )
    other = class_name("model", flat.get("model", task)) or task
    if other != task:  # its head would not be the LoRA's
        train = f", or train a LoRA of it first: randlora-pl fit --config CONFIG --model {other} --model.adapter LoRA"
        raise UserError(
            f"{adapter} is a LoRA of {task}, not of {other}. Remove --model or the config that sets it"
            + (train if _from_lora(other) else ".")  # a LoRA beside prompts is refused, too
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
    has imported; beside an adapter only data options are read.

    Raises:
        UserError: An option does not fit the verb; see also `compose` and `check_names`.
    """
    args = list(map(underscored, args))
    folders = folders_in(args, FOLDER_OPTIONS[verb])
    typed = {word.partition("=")[0].replace("from_", "from-") for word in args}
    found = [option for option in ("--ckpt_path", "--from-adapter", "--from-form") if option in typed]
    if found and verb != "fit":
        raise UserError(
            f"{verb} does not support {found[0]}. Name an adapter folder (--adapter) or a run (--run) instead."
        )
    if found and "resume" in folders:
        raise UserError(f"--resume uses the run's own checkpoint. Remove {found[0]}, or remove --resume.")
    users = compose(verb, args, {})
    import_classes(users)  # before a file that is not the user's is read
    defaults, words = copy.deepcopy(DEFAULTS), list(args)
    if "resume" in folders:
        words = ["--config", str(check_run_config(check_run(folders["resume"]))), *words]
    elif "run" in folders:
        words = ["--config", str(check_run_config(check_run(folders["run"]))), *words]
        find_adapter(folders["run"])  # raises the error of a run without one
    beside = config_beside(folders["adapter"]) if "adapter" in folders and not users.named else None
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
