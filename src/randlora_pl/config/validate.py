"""Check of the typed names against the source text, with near matches for each error."""

import ast
import difflib
import os
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from randlora_pl.config.class_index import ClassSource, read_classes, subclasses, trainer_options
from randlora_pl.config.compose import CLASSES, Command, flatten, is_option, normalize, read_config, short_name
from randlora_pl.utils.errors import UserError, brief, near, shortened

RUN_OPTIONS = {
    "name": "Name of the run; its folder is ROOT/NAME/TIME. Default: data set, model and adapter",
    "root": "Folder of all runs. Default: runs",
    "logger": "tensorboard, csv, wandb, or several: [tensorboard,csv]. Default: tensorboard",
    "timeout": "Seconds that a process waits for the others before it takes them for lost. Default: 600",
}
CALLBACK_GROUPS = {"checkpoint": "AdapterCheckpoint", "gradient_flow": "GradientFlow", "spectrum": "UpdateSpectrum"}
IN_CONFIGS = {"seed_everything", "ckpt_path"}
SINGLE = {"seed_everything", "ckpt_path", "print_config", "config", "help", "h", "help-all"}

IMAGES = "randlora_pl.data.ImageData"

MOST_PARTS = 10**6
"""Most micro-batches per optimizer step: sampled indices are counted in 64 bits."""

Groups = dict[str, set[str] | None]  # None: a class outside this project, whose options are not known here


def tasks() -> dict[str, ClassSource]:
    """Return the task classes by name; those on texts come last."""
    found = subclasses("tasks", "LightningModule") | subclasses("language", "AdaptationTask")
    bases = {base for source in found.values() for base in source.bases}
    return {name: source for name, source in found.items() if name not in bases}


_KINDS = {"ImageData": "images", "TextData": "prompts and completions", "LabelledTexts": "labelled texts"}
_SAME = {"cutoff": "max_length", "max_length": "cutoff"}
"""Data options with the same meaning for another kind of data."""
_SHORT = {"lr": "learning_rate", "bs": "batch_size", "r": "rank", "lora_alpha": "alpha", "lora_r": "rank"}
"""Names of options in other programs, and ours."""
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


def is_text_task(task: str | None) -> bool:
    """Return True if a task is one of the language tasks.

    Args:
        task: Name of the task class, None for a class outside this project.
    """
    return task in tasks() and data_class(task).module == "randlora_pl.language"


def adapters() -> dict[str, ClassSource]:
    """Return the adapter classes by name."""
    return subclasses("adapters", "Adapter")


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
    choices = ", ".join(spelled.values())
    raise UserError(f"Unknown {what} {brief(short)} ({option}).{near(short, spelled.values())} Known: {choices}")


def check_names(command: Command) -> None:
    """Check the classes, the option names and the dataset of a command; correct the spelling of classes.

    Raises:
        UserError: The first unknown name.
    """
    flat = command.flat()
    task = known_class(flat["model"], tasks(), "task", "--model")
    method = known_class(flat["model.adapter"], adapters(), "adapter", "--model.adapter")
    callbacks = read_classes("callbacks")
    groups: Groups = {
        "data": set(data_class(task).options) - {"seed"},  # seed_everything sets it
        "trainer": set(trainer_options()) or None,
        "run": set(RUN_OPTIONS),
        "model": set(tasks()[task].options) - {"seed"} if task else None,
        "model.adapter": set(adapters()[method].options) if method else None,
    }
    inner = flat.get("model.adapter.inner")
    if inner is not None:
        inner = known_class(inner, adapters(), "adapter", "--model.adapter.inner")
        groups["model.adapter.inner"] = set(adapters()[inner].options) if inner else None
    groups |= {group: set(callbacks[name].options) for group, name in CALLBACK_GROUPS.items()}
    typed = [*command.values, *(word.lstrip("-").partition("=")[0] for word in command.typed if is_option(word))]
    empty = [key for key, value in command.config.items() if value == {}]
    for key in dict.fromkeys([*typed, *flat, *empty]):
        _check_option(command, key, groups, key in typed)
    for option, name in zip(CLASSES, (task, method, inner), strict=True):
        _spell(command, option, name)
    seed = flat.get("seed_everything", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UserError(f"--seed_everything is {brief(seed)}: give a whole number from 0 to {2**32 - 1}.")
    _check_trainer(flat)
    if "data.dataset" in flat:
        _check_dataset(task, str(flat["data.dataset"]))
    with suppress(TypeError, AttributeError):  # a value of another type, which the parser refuses
        _check_data(task, flat)


def _check_trainer(flat: dict[str, Any]) -> None:
    """Refuse numbers that Lightning accepts and fails at, or that would start thousands of processes.

    Raises:
        UserError: An option is out of range; the message names it.
    """
    parts = flat.get("trainer.accumulate_grad_batches")
    if isinstance(parts, int) and not 1 <= parts <= MOST_PARTS:
        raise UserError(
            f"--trainer.accumulate_grad_batches is {brief(parts)}: give a whole number from 1 to {MOST_PARTS:,}."
        )
    if str(flat.get("trainer.precision")) in ("64", "64-true"):
        raise UserError(
            "--trainer.precision 64 does not fit images, which are float32: leave it out, or give bf16-mixed."
        )
    devices, most = flat.get("trainer.devices"), max(16, 2 * (os.cpu_count() or 1))
    if isinstance(devices, int) and devices > most:
        raise UserError(
            f"--trainer.devices is {brief(devices)}: each is a process; give at most {most} on this machine."
        )


def _check_dataset(task: str | None, dataset: str) -> None:
    """Refuse an unknown dataset.

    Raises:
        UserError: The dataset is unknown; near names are suggested.
    """
    if is_text_task(task):
        from randlora_pl.language.catalog import check_dataset

        check_dataset(dataset, data_class(task).name == "LabelledTexts")
        return
    from randlora_pl.data.catalog.registry import CATALOG, find
    from randlora_pl.language.catalog import DATASETS, LABELLED, TASKS

    fits = [name for name, known in zip(TASKS, (DATASETS, LABELLED), strict=True) if dataset in known]
    if dataset not in CATALOG and fits:
        raise UserError(f"The data set {dataset!r} is of texts: it needs --model {' or '.join(fits)}.")
    find(dataset)


def _check_data(task: str | None, flat: dict[str, Any]) -> None:
    """Refuse contradictory data options, seconds before the data module is imported.

    Raises:
        UserError: Data options contradict each other; the message names one.
    """
    from randlora_pl.data import validate as options
    from randlora_pl.data.catalog.registry import find

    source = data_class(task)
    values = {name: ast.literal_eval(option.default or "None") for name, option in source.options.items()}
    values |= {name: flat[f"data.{name}"] for name in values if f"data.{name}" in flat}
    if source.name == "ImageData":
        options.check(values, find(values["dataset"]))
        if task:
            blended = tasks()[task].constants.get("blended_labels", False)
            options.check_softmax(values["mixup"], values["cutmix"], task, blended)
    elif "balance" in values:
        scores = values["scores"] or values["dataset"] == "stsb"
        options.check_balance(values["balance"], "scores" if scores else "")


def _check_option(command: Command, key: str, groups: Groups, typed: bool) -> None:
    parts = short_name(key).split(".")
    if key in IN_CONFIGS or (typed and (parts[0] in SINGLE or parts[-1] == "help")):
        return
    places = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    group = next((place for place in places if place in groups), parts[0])
    rest = parts[group.count(".") + 1 :]
    if group in groups:
        known = groups[group]
        if not rest or known is None or rest[0] in known:
            return
    where = _file_with(command, key)
    if where and (verb := _verb_of(where)):
        raise UserError(f"{where} describes several runs, not one: randlora-pl {verb} {shlex.quote(str(where))}")
    what = f"Unknown key {shortened(key, 80)} in {where}." if where else f"Unknown option --{shortened(key, 80)}."
    raise UserError(
        f"{what}{_suggest(group, rest or parts, groups)} All options: randlora-pl {command.verb} --help-all"
    )


def _file_with(command: Command, key: str) -> Path | None:
    """Return the config file that sets a key; None if it was typed."""
    if key in command.values:
        return None
    for file in map(Path, reversed(command.named)):
        tree = normalize(read_config(file))
        if key in tree or key in flatten(tree):
            return file
    return None


def _verb_of(file: Path) -> str:
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
    if group == "data" and (kinds := _other_kinds(rest[0])):
        same = _SAME.get(rest[0])
        return (
            f" It is one of {' and of '.join(kinds)}{f'; here --data.{same}' if same in (groups[group] or ()) else ''}."
        )
    if group == "model" and rest[0] in _NEEDS:
        fits = [name for name, task in tasks().items() if rest[0] in task.options and not is_text_task(name)]
        return f" It needs {_NEEDS[rest[0]]}: --model {' or '.join(fits)}."
    known = {"model": tasks(), "model.adapter": adapters(), "model.adapter.inner": adapters()}.get(group, {})
    if owners := [name for name, source in known.items() if rest[0] in source.options]:
        return f" It belongs to {', '.join(owners)}: --{group} {owners[0]}."
    rest = [*rest[:-1], _SHORT.get(rest[-1], rest[-1])]
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


def _spell(command: Command, option: str, name: str | None) -> None:
    """Replace a class's name, typed or from a config, by its right spelling."""
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
