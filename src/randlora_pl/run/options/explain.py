"""Mistakes in the options of a command, each in one line with near names: jsonargparse would take ten, after seconds.

The declarations are the only source: names and types of options, and the classes of each kind.
"""

import difflib
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from randlora_pl.run.options.class_index import Option
from randlora_pl.run.options.classes import CLASS_KEYS, INNER, LISTED
from randlora_pl.run.options.compose import Command, parse_value, short_name
from randlora_pl.run.options.validate import (
    IN_CONFIGS,
    SINGLE,
    Groups,
    adapters,
    class_choices,
    data_class,
    file_with,
    is_text_task,
    known_class,
    tasks,
    verb_of,
)
from randlora_pl.utils.errors import UserError, brief, near, shortened
from randlora_pl.utils.files.documents import parse_yaml
from randlora_pl.utils.options import OTHER_NAMES, literal_words, misfit
from randlora_pl.utils.own_classes import path_by_name

_KINDS = {"ImageData": "images", "TextData": "prompts and completions", "LabelledTexts": "labelled texts"}
_SAME = {"cutoff": "max_length", "max_length": "cutoff"}
"""Data options with the same meaning for another kind of data."""
_NEEDS = {"label_smoothing": "a softmax over all classes"}
"""Options of some image tasks, and the feature that only these tasks have."""


# Names


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


# Values


def check_value(command: Command, key: str, option: Option, value: Any) -> Any:
    """Return the value of an option, a number in quotes as a number; refuse one that does not have the option's type.

    Args:
        command: The command.
        key: Short name of the option.
        option: Its declaration.
        value: Its value, as YAML reads it.

    Raises:
        UserError: The value has another type; the message has the line of a config.
    """
    typed, kind = command.values.get(key), option.type
    number = parse_value(value) if isinstance(value, str) else value
    whole = isinstance(value, float) and value.is_integer() and typed is None  # sweeps take 6.0 for 6
    wrong = misfit(int(value) if whole and misfit(value, kind) else value, kind, key)
    if wrong is None or (typed is not None and misfit(typed, kind) is None):
        return value
    if isinstance(number, int | float) and misfit(number, kind) is None:
        return number
    if typed is not None and typed[:1] in ("[", "{"):
        _check_yaml(key, typed)
    shown = typed if typed is not None and wrong.name == key else str(wrong.value)
    hint = near(shown, literal_words(kind), 1)
    wanted = wrong.wanted.replace("[a,b]", f"'[{shown}]'") if re.fullmatch(r"[\w./-]+", shown) else wrong.wanted
    file = None if typed is not None else file_with(command, key)
    line = file and line_numbers(file).get(key)
    raise UserError(
        f"--{wrong.name}: expected {wanted}, not {shortened(shown, 80)}{'.' * bool(hint)}{hint}",
        where=f"{file}, line {line}" if line else str(file or ""),
    )


def _check_yaml(key: str, typed: str) -> None:
    """Refuse a list or mapping that is not YAML.

    Raises:
        UserError: It is not; the message has the right quotes for a pattern.
    """
    try:
        parse_yaml(typed)
    except yaml.YAMLError as error:
        hint = "Put single quotes inside, in which a backslash is itself: \"['.*attn\\.(q|v)']\""
        what = f"--{key} is not valid YAML: {getattr(error, 'problem', None) or error}."
        raise UserError(what, hint * ("\\" in typed)) from None


def check_adapters(command: Command, key: str, nodes: Any) -> None:
    """Check a list of adapters, which is one value of a config, and correct the spelling of their classes.

    Args:
        command: The command.
        key: Short name of the option.
        nodes: Its value.

    Raises:
        UserError: The value is anything but a list of adapters, or a class, an option or a value is wrong.
    """
    if not (isinstance(nodes, list) and all(isinstance(node, dict) and "class_path" in node for node in nodes)):
        raise UserError(f"--{key} is {brief(nodes)}: give a list, such as '[{{class_path: LoRA, rank: 8}}, RandLoRA]'.")
    for place, node in enumerate(nodes):
        method = known_class(node["class_path"], adapters(), "adapter", f"--{key}")
        if method is None:
            continue
        node["class_path"], known = method, adapters()[method].options
        for name, value in node.get("init_args", {}).items():
            if name == "targets":
                raise UserError(f"--{key}: all parts adapt the same layers. Set --model.targets instead of targets.")
            if name not in known:
                hint = near(OTHER_NAMES.get(name, name), known) or f" Its options are {', '.join(known)}."
                raise UserError(f"--{key}: {method} has no option {brief(name)}.{hint}")
            if name == LISTED:
                check_adapters(command, f"{key}.{place}.{name}", value)
            elif name == INNER:
                node["init_args"][name] = inner = {"class_path": "LoRA"} | value
                check_adapters(command, f"{key}.{place}.{name}", [inner])
            else:
                check_value(command, f"{key}.{place}.{name}", known[name], value)


def line_numbers(file: Path) -> dict[str, int]:
    """Return the line of every option of a config, by short names (see `flatten`)."""
    found: dict[str, int] = {}

    def walk(prefix: str, node: Any) -> None:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            plain = name.value in ("class_path", "init_args")
            key = prefix if plain else f"{prefix}.{name.value}".strip(".")
            if name.value != "init_args":
                found[key] = name.start_mark.line + 1
            walk(key, value)

    walk("", yaml.compose(file.read_text(encoding="utf-8"), yaml.SafeLoader))
    return found
