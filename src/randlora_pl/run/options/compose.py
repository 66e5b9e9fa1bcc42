"""Composition of what was typed into one config and the options that override it.

Plain LightningCLI keeps the old method's rank when the adapter's class changes, and lets a checkpoint override what
the user typed. Here the config files are merged first, and a new adapter class starts from its own defaults. The length
of the run is epochs or optimizer steps, whichever was set last. A class has one form: ``{class_path: NAME, init_args:
{...}}``.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from randlora_pl.run.options.classes import options_of, rate_name, task_of
from randlora_pl.run.options.shipped import find_config
from randlora_pl.tasks import DEFAULT
from randlora_pl.utils.errors import UserError, brief, errors_in
from randlora_pl.utils.files import parse_yaml
from randlora_pl.utils.own_classes import path_of
from randlora_pl.utils.run_files import find_adapter, find_run

ALIASES = {"trainer.max_epochs": "data.epochs", "trainer.max_steps": "data.steps"}
"""Lightning's options of the length, and ours. A run is one Lightning epoch over all that it draws."""


def alias(option: str, value: object, other: Mapping[str, Any]) -> str:
    """Return our option for one of Lightning's, where both mean the same; any other option is returned unchanged.

    Beside a length of the data, ``max_steps`` is a limit, and 1 is the ``max_epochs`` of every run. Zero is always
    ours, which is an error.

    Args:
        option: Option, such as ``trainer.max_steps``.
        value: Its value, typed or from a config.
        other: Options given with it, by the same names.
    """
    positive = re.fullmatch(r"[1-9]\d*", str(value)) is not None
    alone = all(other.get(name) in (None, "null") for name in ALIASES.values())
    ours = (positive and alone) or str(value) == "0"
    return ALIASES[option] if option in ALIASES and ours else option


def with_our_length(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which the data's options have Lightning's place (see `alias`)."""
    trainer, data = tree.get("trainer"), tree.get("data") or {}
    if not (isinstance(trainer, dict) and isinstance(data, dict)):
        return dict(tree)
    for option in ALIASES:
        name = option.partition(".")[2]
        ours = alias(option, trainer.get(name), {f"data.{key}": value for key, value in data.items()})
        if ours != option:
            data = data | {ours.partition(".")[2]: trainer[name]}
            trainer = {key: value for key, value in trainer.items() if key != name}
    return {**tree, "trainer": trainer, **({"data": data} if data else {})}


def without_other_length(data: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return data options without the epochs (or steps) that later options replace by steps (or epochs).

    Args:
        data: Data options of a config, such as the resolved one of a run, which always has a length.
        later: Data options that override them; a typed null is still text.
    """
    given = {name for name in ("steps", "epochs") if later.get(name) not in (None, "null")}
    replaced = {"steps", "epochs"} - given if given else set()
    return {name: value for name, value in data.items() if name not in replaced}


Tree = dict[str, Any]

CLASSES = ("model", "model.adapter", "model.adapter.inner", "model.prompts", "model.head", "model.regulation")
"""Options with a class as value, each after the one whose argument it is."""
INNER, LISTED = "inner", "parts"
"""Arguments of an adapter that are an adapter and a list of adapters."""
LISTS = (f"model.adapter.{LISTED}", f"model.adapter.{INNER}.{LISTED}")
"""Options with a list of classes as value."""
CLASS_KEYS = frozenset({"class_path", "init_args", "dict_kwargs"})
"""Keys by which a config builds an object of any class."""


def normalize(tree: Tree) -> Tree:
    """Return the same config with every class as ``{class_path: NAME, init_args: {...}}``, and no empty sections.

    Raises:
        UserError: A section or a class has another type.
    """
    tree = {key: value for key, value in _mapping("a config", tree).items() if value is not None}
    for group in ("data", "trainer", "run", "checkpoint", "gradient_flow", "spectrum", "unseen_gradient"):
        if group in tree:
            _mapping(group, tree[group])
    if "model" in tree:
        tree["model"] = _as_class("model", tree["model"])
    return tree


def _as_class(option: str, value: Any) -> Tree:
    """Return the value of an option as a class, with the classes among its arguments."""
    node = {"class_path": value} if isinstance(value, str) else dict(_mapping(option, value, "a class or "))
    if not isinstance(node.get("class_path", ""), str):
        raise UserError(f"{option} is {brief(node['class_path'])}: give the name of a class.")
    arguments = dict(_mapping(f"init_args of {option}", node.pop("init_args", None) or {}))
    for name in set(node) - {"class_path", "dict_kwargs"}:  # as on the command line, which leaves init_args out
        arguments[name] = node.pop(name)
    for name in set(arguments) & set(_inside(option)):
        if arguments[name] is not None:
            arguments[name] = _as_class(f"{option}.{name}", arguments[name])
        elif f"{option}.{name}" not in ("model.head", "model.regulation"):
            del arguments[name]
    if option.startswith("model.adapter") and isinstance(arguments.get(LISTED), list):
        arguments[LISTED] = [_as_class(f"{option}.{LISTED}", each) for each in arguments[LISTED]]
    return node | ({"init_args": arguments} if arguments else {})


def _inside(option: str) -> list[str]:
    """Return the names of the arguments of an option's class that are classes themselves."""
    place = "model.adapter" if option.startswith("model.adapter.") else option  # an adapter in another is like any
    return [name for above, _, name in (each.rpartition(".") for each in CLASSES) if above == place]


def _mapping(what: str, value: Any, other: str = "") -> Tree:
    if not isinstance(value, dict):
        raise UserError(f"{what} is {brief(value)}: expected {other}options such as {{name: value}}.")
    for key in value:
        if not isinstance(key, str):
            raise UserError(f"{what} has the key {brief(key)}, which is not the name of an option.")
    return value


def with_default_classes(tree: Tree, typed: Iterable[str] = ()) -> Tree:
    """Return a normalized config with the classes that its task takes by default, whose options then need no class.

    Typed options, by short names, may belong to a class that no default has.
    """
    model = tree.get("model", {})
    if (task := task_of(str(model.get("class_path")))) is None:
        return tree
    arguments = dict(model.get("init_args") or {})
    for name in _inside("model"):
        option, given = options_of(task).get(name), arguments.get(name, {})
        if option is None or not isinstance(given, dict) or "class_path" in given:
            continue
        kind = type(option.default)
        if option.default is None and (given or any(key.startswith(f"model.{name}.") for key in typed)):
            kind = get_args(option.kind)[0]
        if kind is not NoneType:
            arguments[name] = {"class_path": path_of(kind)} | given
    return tree | {"model": model | {"init_args": arguments}} if arguments else tree


FOLDER_OPTIONS = {"fit": ("resume",), "validate": ("run", "adapter"), "test": ("run", "adapter")}
"""Options that name a folder and are not part of a config, by command."""


@dataclass
class Command:
    """Sorted words of a command line.

    Attributes:
        verb: ``fit``, ``validate`` or ``test``.
        config: All config files, merged.
        typed: The other options, as typed; they override the config.
        values: The same options by short name (``model.adapter.rank``).
        folders: Values of the options that name a folder (``resume``, ``run``, ``adapter``).
        named: Path or name of each config, in order.
        bare_root: True if the config that sets ``data.root`` sets no ``data.dataset``.
    """

    verb: str
    config: Tree = field(default_factory=dict)
    typed: list[str] = field(default_factory=list)
    values: dict[str, str] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    bare_root: bool = False

    def flat(self) -> dict[str, Any]:
        """Return the config by short names, with the typed options on top."""
        result = flatten(self.config)
        for key, text in self.values.items():
            if key in CLASSES[1:] and _last(result.get(key)) != _last(text):
                result = {name: value for name, value in result.items() if not name.startswith(f"{key}.")}
            result[key] = parse_value(text)
        return result

    def checksum(self) -> str:
        """Return a checksum of the typed options and the text of the configs: the same for the same command."""
        texts = [Path(name).read_text(encoding="utf-8", errors="replace") for name in self.named]
        return hashlib.sha256(json.dumps([self.typed, texts]).encode()).hexdigest()


def parse_value(text: str) -> Any:
    """Return a typed value as YAML reads it; text that is not YAML stays text."""
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def read_config(file: Path) -> Tree:
    """Return one config file.

    Raises:
        UserError: The file is not readable, not YAML, or not a mapping.
    """
    try:
        content = parse_yaml(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{file}{where} is not valid YAML: {getattr(error, 'problem', error)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict | None):
        raise UserError(f"{file} is not a config: expected `key: value` lines such as `data: {{dataset: digits}}`.")
    return content or {}


def merge(old: Any, new: Any, key: str = "") -> Any:
    """Return ``old`` overridden by ``new``: mappings merge, everything else is replaced; a new class starts afresh.

    The model is the exception: another task keeps the name, the adapter and so on.

    Args:
        old: The present value, with class names in ``class_path``.
        new: The value that overrides it.
        key: Dotted path of the two, for the exception.
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    changes = "class_path" in new and "class_path" in old and _last(new["class_path"]) != _last(old["class_path"])
    if changes and key != "model":
        return new
    old = without_other_length(old, new) if key == "data" else old
    return old | {name: merge(old.get(name), value, f"{key}.{name}".strip(".")) for name, value in new.items()}


def _last(class_path: Any) -> str:
    return str(class_path).rpartition(".")[2].lower()


def flatten(tree: Tree) -> dict[str, Any]:
    """Return a config by short names: ``init_args`` left out, a class under its option's own name."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and ("class_path" in node or "init_args" in node):
            if "class_path" in node:
                flat[prefix] = node["class_path"]
            arguments = node.get("init_args") or {}
            if not isinstance(arguments, dict):  # the parser reports the error
                flat[f"{prefix}.init_args"] = arguments
                return
            for name, value in arguments.items():
                walk(f"{prefix}.{name}", value)
        else:
            flat[prefix] = node

    for group, content in tree.items():
        if group == "model" or not isinstance(content, dict):
            walk(group, content)
        else:
            for name, value in content.items():
                walk(f"{group}.{name}", value)
    return flat


def short_name(option: str) -> str:
    """Return ``--model.init_args.adapter`` as ``model.adapter``."""
    parts = [part for part in option.lstrip("-").rstrip("+").split(".") if part not in ("init_args", "class_path")]
    return ".".join(parts)


def compose(verb: str, args: Iterable[str], defaults: Tree) -> Command:
    """Sort the words after a command and read the config files.

    Args:
        verb: ``fit``, ``validate`` or ``test``.
        args: The words after it.
        defaults: Config that the first config file is merged into.

    Raises:
        UserError: A word that is not an option, a missing value, an unreadable file.
    """
    command = Command(verb, config=normalize(copy.deepcopy(defaults)))
    words = list(map(underscored, args))
    folder_options = FOLDER_OPTIONS[verb]
    while words:
        word = words.pop(0)
        option, equals, value = word.partition("=")
        if not is_option(word):
            raise UserError(f"{brief(word)} is not an option.{_hint(word)} See: randlora-pl {verb} --help")
        own = option in ("-c", "--config") or option[2:] in folder_options
        if not equals and words and not is_option(words[0]):
            value, equals = words.pop(0), "="
        if not own:
            if option == "--trainer.callbacks" and re.fullmatch(r"[\w.]+", value):
                option += "+"  # one more callback, as in jsonargparse's --trainer.callbacks+=NAME
            joined = option == "--print_config"  # the parser takes its flags only in one word
            command.typed += [f"{option}={value}"] if joined and equals else [option, value] if equals else [option]
            if equals:
                command.values[short_name(option)] = value
            continue
        if not equals:
            what = "a name or a file" if "c" in option[:3] else "a folder"
            raise UserError(f"{option} needs {what} after it.")
        if option in ("-c", "--config"):
            file = find_config(value)
            tree = read_config(file)
            if not tree:
                raise UserError(f"{file} is empty: it sets no option. Leave it out. See: randlora-pl config list")
            with errors_in(file):
                command.config = merge(command.config, with_our_length(normalize(tree)))
            command.named.append(str(file))
            data = tree.get("data") or {}
            command.bare_root = "dataset" not in data if "root" in data else command.bare_root
        else:
            command.folders[option[2:]] = folder_of(option[2:], value)
    _take_length(command)
    _take_classes(command)
    command.config = with_default_classes(command.config, command.values)
    _take_nulls(command)
    if "data" in command.config:
        typed = {name.removeprefix("data."): text for name, text in command.values.items()}
        command.config["data"] = without_other_length(command.config["data"], typed)
    return command


def folder_of(option: str, value: str) -> Path:
    """Return the folder that ``--resume``, ``--run`` or ``--adapter`` names; ``--resume auto`` names none yet."""
    if (option, value) == ("resume", "auto"):
        return Path(value)
    return find_adapter(value) if option == "adapter" else find_run(value)


def is_option(word: str) -> bool:
    """Return True if a word is an option; a negative number is not one."""
    return re.match(r"--?[A-Za-z]", word) is not None


def underscored(word: str) -> str:
    """Return ``--data.batch-size=4`` as ``--data.batch_size=4``; return any other word unchanged."""
    option, equals, value = word.partition("=")
    if not is_option(word) or option in ("--help-all", "--dry-run"):
        return word
    return re.sub(r"(?<=\w)-", "_", option) + equals + value


def _hint(word: str) -> str:
    try:
        find_config(word)
    except UserError:
        return ""
    return f" Did you mean --config {word}?"


def _take_length(command: Command) -> None:
    """Replace a typed length of the trainer by the same length of the data."""
    for option in ALIASES:
        ours = alias(option, command.values.get(option), command.values)
        if ours != option:
            command.values[ours] = command.values.pop(option)
            command.typed = [f"--{ours}" if word == f"--{option}" else word for word in command.typed]


def _at(option: str, value: Any) -> Tree:
    """Return a config with one value, at a name such as ``model.adapter``."""
    for name in reversed(option.split(".")):
        value = {name: value}
    tree: Tree = value
    return tree


def _take_classes(command: Command) -> None:
    """Put typed classes into the config; one that differs from the config's drops the options of the old one."""
    for option in (*CLASSES, *LISTS):
        text = command.values.get(option)
        if text is None:
            continue
        value = parse_value(text)
        if value is not None:
            command.config = merge(command.config, normalize(_at(option, value)))
        if not isinstance(value, str):  # a mapping or a list, which is in the config now; anything else was an error
            _remove(command, option)


def _take_nulls(command: Command) -> None:
    """Put a typed ``null`` of a class inside the model into the config; the parser would make the text "None" of it."""
    for key, text in list(command.values.items()):
        if key.rpartition(".")[0] in CLASSES[1:] and text == "null":
            command.config = merge(command.config, normalize(_at(key, None)))
            _remove(command, key)


def _remove(command: Command, key: str) -> None:
    del command.values[key]
    place = next(n for n, word in enumerate(command.typed) if is_option(word) and short_name(word) == key)
    del command.typed[place : place + 2]


DEFAULTS: Tree = {"model": {"class_path": DEFAULT}}


def nested(options: Tree) -> Tree:
    """Return options such as ``{data.steps: 5}`` as ``{data: {steps: 5}}``; both may be mixed."""
    tree: Tree = {}
    for key, value in options.items():
        tree = merge(tree, _at(str(key), nested(value) if isinstance(value, dict) else value))
    return tree


def planned_name(flat: dict[str, Any]) -> str:
    """Return a run's default name, from its config by short names: dataset, model, prompts and adapter."""
    prompts, adapter = (str(flat.get(f"model.{name}", "")).rpartition(".")[2] for name in ("prompts", "adapter"))
    words = (
        str(flat.get("data.dataset", "digits")),
        Path(str(flat.get("model.name", "tiny"))).name,
        prompts,
        "" if prompts and rate_name(adapter, None) == "prompt_learning_rate" else adapter,
    )
    return "_".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-.") for word in words if word)
