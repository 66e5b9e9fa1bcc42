"""Classes and options that a command may name, from the source text."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from randlora_pl.run.options.class_index import ClassSource, Option, read_classes, subclasses, trainer_options
from randlora_pl.run.options.classes import normalize
from randlora_pl.run.options.compose import Command, flatten, read_config
from randlora_pl.utils.errors import UserError, brief, near
from randlora_pl.utils.own_classes import path_by_name

CALLBACK_GROUPS = {
    "checkpoint": "AdapterCheckpoint",
    "gradient_flow": "GradientFlow",
    "spectrum": "UpdateSpectrum",
    "unseen_gradient": "UnseenGradient",
}
IN_CONFIGS = {"seed_everything", "ckpt_path", "from_adapter", "from_form"}
SINGLE = {*IN_CONFIGS, "print_config", "config", "help", "h", "help-all"}

FORMS = ("beside", "absorbed")
"""Places of the LoRA that a training starts from, in the method that it trains."""

IMAGES = "randlora_pl.data.ImageData"

Groups = dict[str, dict[str, Option] | None]  # None: a class outside this project, whose options are not known here


@cache
def tasks() -> dict[str, ClassSource]:
    """Return the task classes by name; those on texts come last."""
    found = subclasses("tasks", "LightningModule") | subclasses("language", "AdaptationTask")
    bases = {base for source in found.values() for base in source.bases}
    return {name: source for name, source in found.items() if name not in bases}


def data_class(task: str | None) -> ClassSource:
    """Return the class of a task's data; of a class outside this project, images.

    Args:
        task: Name of the task class, None for a class outside this project.
    """
    path = tasks()[task].constants.get("data_module", IMAGES) if task else IMAGES
    package, name = path.split(".")[1], path.rpartition(".")[2]
    return read_classes(package)[name]


def rate_name(method: str, task: str | None) -> str:
    """Return the option with a method's learning rate: of a linear probe the head's, of `Frozen` the prompts'.

    Args:
        method: Name of the method.
        task: Name of the task class, None for a class outside this project. A text task has the adapter's for its head.
    """
    alone = {} if is_text_task(task) else {"LinearProbe": "head_learning_rate", "Frozen": "prompt_learning_rate"}
    return alone.get(method, "learning_rate")


def is_text_task(task: str | None) -> bool:
    """Return True if a task is one of the language tasks.

    Args:
        task: Name of the task class, None for a class outside this project.
    """
    return task in tasks() and data_class(task).module == "randlora_pl.language"


@cache
def adapters() -> dict[str, ClassSource]:
    """Return the adapter classes by name."""
    return subclasses("adapters", "Adapter")


@cache
def class_choices() -> dict[str, dict[str, ClassSource]]:
    """Return the classes of each option of `CLASSES` by name."""
    parts, options = subclasses("tasks", "Described"), tasks()["PromptTask"].options
    found = {"model": tasks(), "model.adapter": adapters(), "model.adapter.inner": adapters()}
    found["model.prompts"] = subclasses("prompts", "PromptLearner")
    for name in ("head", "regulation"):
        found[f"model.{name}"] = {kind: parts[kind] for kind in options[name].kind.split(" | ") if kind in parts}
    return found


def known_class(name: object, known: Iterable[str], what: str, option: str) -> str | None:
    """Return the class's name as the source spells it; None for a class outside this project (a dotted path).

    Raises:
        UserError: The class is unknown; near names are suggested.
    """
    if re.fullmatch(r"\w+(\.\w+)+", str(name)) and not str(name).startswith("randlora_pl."):
        return None
    short = str(name).rpartition(".")[2]
    spelled = {candidate.lower(): candidate for candidate in known}
    if short.lower() in spelled:
        return spelled[short.lower()]
    if path_by_name(short) is not None:
        return None
    every = ", ".join(spelled.values())
    raise UserError(f"Unknown {what} {brief(short)} ({option}).{near(short, spelled.values())} Known: {every}")


def groups_of(names: dict[str, str | None], task: str | None = None) -> Groups:
    """Return the options of a command by group.

    Args:
        names: Names of the classes by option (see `CLASSES`); None for a class outside this project.
        task: Name of the task whose data the command has.
    """
    callbacks = read_classes("run/callbacks")
    own = read_classes("run/options")["RunOptions"].options
    groups: Groups = {"data": data_class(task).options, "run": own, "trainer": trainer_options() or None}
    groups |= {group: callbacks[name].options for group, name in CALLBACK_GROUPS.items()}
    for option, name in names.items():
        groups[option] = class_choices()[option][name].options if name else None
    return {
        group: None
        if options is None
        else {name: options[name] for name in options if name != "seed"}
        if group in ("data", "model")
        else options
        for group, options in groups.items()
    }  # seed_everything sets the seeds of data and model


def check_form(flat: dict[str, Any]) -> None:
    """Refuse an unknown place of the LoRA to start from, a place without a LoRA, and a checkpoint beside one.

    Raises:
        UserError: The message has what to type.
    """
    form = flat.get("from_form", FORMS[0])
    if form not in FORMS:
        raise UserError(f"--from-form is {brief(form)}.{near(str(form), FORMS)} Set {' or '.join(FORMS)}.")
    if form != FORMS[0] and flat.get("from_adapter") is None:  # a printed config has the default
        raise UserError("--from-form needs a LoRA to start from. Add --from-adapter RUN, or remove it.")
    if flat.get("ckpt_path") is not None and flat.get("from_adapter") is not None:
        raise UserError("--ckpt_path continues a run, and --from-adapter starts a new one. Remove one of them.")


def file_with(command: Command, key: str) -> Path | None:
    """Return the config file that sets a key; None if it was typed."""
    if key in command.values:
        return None
    for file in map(Path, reversed(command.named)):
        tree = normalize(read_config(file))
        if key in tree or key in flatten(tree):
            return file
    return None


def verb_of(file: Path) -> str:
    """Return the verb of a config that describes several runs; empty for a config of one."""
    tree = read_config(file)
    return "sweep" * ("methods" in tree)
