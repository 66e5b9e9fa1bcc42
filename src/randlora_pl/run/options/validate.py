"""Check of the typed names against the source text, with near matches for each error."""

import difflib
import re
import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from randlora_pl.run.options.class_index import ClassSource, Option, read_classes, subclasses, trainer_options
from randlora_pl.run.options.classes import CLASS_KEYS, LISTED, normalize
from randlora_pl.run.options.compose import Command, flatten, read_config, short_name
from randlora_pl.utils.errors import UserError, brief, near, shortened
from randlora_pl.utils.own_classes import path_by_name
from randlora_pl.utils.signatures import OTHER_NAMES

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


_KINDS = {"ImageData": "images", "TextData": "prompts and completions", "LabelledTexts": "labelled texts"}
_SAME = {"cutoff": "max_length", "max_length": "cutoff"}
"""Data options with the same meaning for another kind of data."""
_NEEDS = {"label_smoothing": "a softmax over all classes"}
"""Options of some image tasks, and the feature that only these tasks have."""


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


def check_option(command: Command, key: str, groups: Groups, typed: bool) -> None:
    """Refuse an option or a key of a config that does not exist.

    Raises:
        UserError: The option is unknown; the message has its file, and near names.
    """
    parts = (short_name(key) if key.startswith("model") else key.rstrip("+")).split(".")  # others have a fixed class
    if key in IN_CONFIGS or (typed and (parts[0] in SINGLE or parts[-1] == "help")):
        return
    places = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    group = next((place for place in places if place in groups), parts[0])
    rest = parts[group.count(".") + 1 :]
    if group in groups:
        known = groups[group]
        if not rest or known is None or rest[0] in known:
            return
    where = file_with(command, key)
    if where and (verb := verb_of(where)):
        raise UserError(f"{where} describes several runs, not one: randlora-pl {verb} {shlex.quote(str(where))}")
    what = f"Unknown key {shortened(key, 80)} in {where}." if where else f"Unknown option --{shortened(key, 80)}."
    raise UserError(
        f"{what}{_suggest(group, rest or parts, groups)} All options: randlora-pl {command.verb} --help-all"
    )


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


def _suggest(group: str, rest: list[str], groups: Groups) -> str:
    """Return options with the same last part, else near ones of the same group, else near ones of any group.

    An option of another kind of data is marked as such.
    """
    every = {name: f"--{name}" for name in sorted(SINGLE - {"h"})}
    every |= {f"{place}.{name}": f"--{place}.{name}" for place, names in groups.items() for name in sorted(names or ())}
    if rest[-1] == "seed":
        return " Did you mean --seed_everything?"
    if rest[-1] in ("dryrun", "dry"):  # `fit` takes it out of its words before
        return " Did you mean --dry-run?"
    if rest[0] in CLASS_KEYS:
        return f" Write its options directly under {group}."
    if group == "data" and (kinds := _other_kinds(rest[0])):
        same = _SAME.get(rest[0])
        return (
            f" It is one of {' and of '.join(kinds)}{f'; here --data.{same}' if same in (groups[group] or ()) else ''}."
        )
    if group == "model" and rest[0] in _NEEDS:
        fits = [name for name, task in tasks().items() if rest[0] in task.options and not is_text_task(name)]
        return f" It needs {_NEEDS[rest[0]]}: --model {' or '.join(fits)}."
    if "inner" in (groups.get(group) or ()) and rest[0] in adapters()["LoRA"].options:
        return f" Did you mean --{group}.inner.{rest[0]}?"
    if LISTED in (groups.get(group) or ()) and rest[0] in adapters()["LoRA"].options:
        return (
            f" It belongs to one of the parts: --{group}.{LISTED} '[{{class_path: LoRA, {rest[0]}: ...}}, RandLoRA]'."
        )
    if (group, rest[0]) == ("model.adapter", "match"):
        return " It chooses the size of an update. This method has none, because it trains the model's own tensors."
    known = class_choices().get(group, {})
    if owners := [name for name, source in known.items() if rest[0] in source.options]:
        return f" It belongs to {', '.join(owners)}: --{group} {owners[0]}."
    rest = [*rest[:-1], OTHER_NAMES.get(rest[-1], rest[-1])]
    found = [option for name, option in every.items() if name.rpartition(".")[2] == rest[-1]]
    if not found and groups.get(group):
        names = sorted(groups[group] or ())
        matches = [name for name in names if name.startswith(rest[0])]
        matches = matches or difflib.get_close_matches(rest[0], names, 2, 0.6)
        found = [".".join([f"--{group}", match, *rest[1:]]) for match in matches]
    if not found:
        by_end = {name.rpartition(".")[2]: option for name, option in every.items()}
        found = [by_end[match] for match in difflib.get_close_matches(rest[-1], by_end, 2, 0.6)]
    return f" Did you mean {' or '.join(found[:3])}?" if found else ""


def _other_kinds(option: str) -> list[str]:
    """Return the kinds of data that have an option which the data of the command does not have."""
    found = {data.name: data for data in map(data_class, tasks())}
    return [kind for name, kind in _KINDS.items() if option in found[name].options]


def spell(command: Command, option: str, name: str | None) -> None:
    """Replace a class's name, typed or from a config, by its right spelling, or by the path of a class from outside."""
    name = name or path_by_name(str(command.flat()[option]))
    if name is None:
        return
    if option in command.values:
        for place, word in enumerate(command.typed):
            if word.startswith("--") and short_name(word) == option:
                command.typed[place + 1] = name
        command.values[option] = name
    node: Any = {"init_args": command.config}
    for part in option.split("."):
        node = node.get("init_args", {}).get(part, {})
    if node:
        node["class_path"] = name
