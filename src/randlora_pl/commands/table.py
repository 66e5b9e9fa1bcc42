"""Table of the commands, and the help pages and hints that name several of them."""

import ast
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from randlora_pl.commands.common.command import Command, first_sentence
from randlora_pl.commands.common.terminal import entry
from randlora_pl.run.options.shipped import config_names
from randlora_pl.utils import __version__
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.options import Words
from randlora_pl.utils.text import log_to_terminal, silence_library_warnings

RUN: Mapping[str, str | tuple[str, ...]] = {
    "fit": "fit",
    "test": "fit",
    "validate": "fit",
    "predict": "predict",
    "adapter": ("info", "diff", "merge", "add", "export", "import", "push", "pull"),
    "analyze": ("spectrum", "represent", "cka", "landscape", "forgetting"),
    "serve": "serve",
    "sweep": "sweep.sweep",
    "tune": "sweep.tune",
    "compare-methods": "sweep.sweep",
    "report": "results",
    "compare": "results",
    "zeroshot": "zeroshot",
    "bench": ("data", "train", "adapters"),
}
LOOK_UP: Mapping[str, str | tuple[str, ...]] = {
    "datasets": "inspect",
    "data": ("get", "check", "show"),
    "models": "inspect",
    "adapters": "inspect",
    "config": ("list", "cat", "cp", "check"),
    "doctor": "inspect",
    "completion": "completion",
}
COMMANDS = {**RUN, **LOOK_UP}
"""Module of each command, in which a function has its name; or the commands of a group.

A command of a group has a module in the package of the group, or the commands of the group share one.
"""

_HOMES = {"diff": "info", "add": "merge", "import": "import_", "push": "hub", "pull": "hub"}
"""Modules in the package of a group that do not have the names of their commands."""

_MEANT = {
    **dict.fromkeys(("train", "finetune", "fine-tune", "run"), "fit"),
    **dict.fromkeys(("eval", "evaluate"), "test"),
    **dict.fromkeys(("infer", "classify", "generate"), "predict"),
}
"""Commands of other programs, and ours."""

_PAGE = f"""\
randlora-pl {__version__}: RandLoRA and its baselines on CLIP, DINOv2 and language models

  randlora-pl fit --config quickstart                      train and test a tiny CLIP in half a minute
  randlora-pl fit --config clip_vitb32 --data.dataset folder --data.root PATH --data.shots 16
  randlora-pl predict --adapter RUN/adapter --images PATH --output predictions.csv

{{}}

For the options of a command, run: randlora-pl COMMAND --help. --version prints the version.
With --import mine, any command finds your own methods and tasks in mine.py.
"""


def members(name: str) -> tuple[str, ...]:
    """Return the commands of a group; of a command, none."""
    found = COMMANDS.get(name)
    return found if isinstance(found, tuple) else ()


def _file(name: str) -> Path:
    """Return the file with the function of a command, or with the explanation of a group."""
    first, _, second = name.partition(" ")
    module = COMMANDS[first]
    path = Path(__file__).parent.joinpath(*(module if isinstance(module, str) else first).split("."))
    if path.is_dir():
        path /= _HOMES.get(second, second) or "__init__"
    return path.with_suffix(".py")


def _is_of(function: str, name: str) -> bool:
    """Return True if a function has the name of a command; a name that Python uses has ``_`` at its end."""
    return function in [f"{name.rpartition(' ')[2].replace('-', '_')}{end}" for end in ("", "_")]


def function_of(name: str) -> Callable[..., int]:
    """Return the function of a command."""
    module = ".".join(_file(name).relative_to(Path(__file__).parent).with_suffix("").parts)
    there = vars(import_module(f"randlora_pl.commands.{module}"))
    found: Callable[..., int] = next(value for key, value in there.items() if _is_of(key, name))
    return found


def summary(name: str) -> str:
    """Return the first sentence on a command or group, without importing its module."""
    tree = ast.parse(_file(name).read_text(encoding="utf-8"))
    if members(name):
        return first_sentence(ast.get_docstring(tree) or "")
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_of(node.name, name))
    return first_sentence(ast.get_docstring(found) or "")


def main_page() -> str:
    """Return the help page of the program."""
    lines = []
    for title, commands in (("Run", RUN), ("Look up", LOOK_UP)):
        for number, name in enumerate(commands):
            inner = f"{' | '.join(members(name))}: " if members(name) else ""
            lines.append(entry(f"{'' if number else title:10}{name}", inner + summary(name), 0, 27))
    return _PAGE.format("\n".join(lines))


def run(words: list[str]) -> int:
    """Run a command, or print the help page of a command or group.

    Returns:
        The exit code: 2 for a command without a word that needs some, whose help page is printed then.

    Raises:
        UserError: The command is unknown.
    """
    name, *rest = words
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command.{_hint(name)} See: randlora-pl --help")
    if inner := members(name):
        if not rest or rest[0] in ("--help", "-h"):
            text = ast.get_docstring(ast.parse(_file(name).read_text(encoding="utf-8")))
            lines = [entry(f"randlora-pl {name} {each}", summary(f"{name} {each}"), 2, 34) for each in inner]
            last = f"For the options of a command, run: randlora-pl {name} COMMAND --help"
            print("\n".join([text or "", "", *lines, "", last]))
            return 0
        if rest[0] not in inner:
            hint = f"{near(rest[0], inner)} Use one of {', '.join(inner)}; see: randlora-pl {name} --help"
            raise UserError(f"Unknown command {name} {rest[0]}.{hint}")
        name, *rest = f"{name} {rest[0]}", *rest[1:]
    function, asked = function_of(name), bool({"--help", "-h"} & set(rest))
    command = Command(name, function)
    silence_library_warnings()
    if command.raw:
        return function(Words(rest))
    if asked or (not rest and command.needed):
        print(command.page, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    arguments = command.arguments(rest)
    if name.partition(" ")[0] in ("analyze", "bench", "data", "zeroshot"):  # they print the application's log
        log_to_terminal()
    return function(**arguments)


def _hint(word: str) -> str:
    """Return a hint on a word that is not a command: an option, a config, a command of ours or of another program."""
    if word.startswith("-"):
        return " The command comes first: randlora-pl fit ..."
    if word in config_names():
        return f" Did you mean: fit --config {word}?"
    meant = [_MEANT[word]] if word in _MEANT else [f"{name} {word}" for name in COMMANDS if word in members(name)]
    return f" Did you mean {' or '.join(map(repr, meant))}?" if meant else near(word, COMMANDS)
