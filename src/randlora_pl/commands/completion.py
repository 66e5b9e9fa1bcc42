"""``completion``: a script for the shell; shtab writes it from the parsers of the commands."""

import argparse
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from randlora_pl.commands.common.arguments import CommandParser, Described
from randlora_pl.commands.help.texts import TEXTS
from randlora_pl.run.options.shipped import config_names
from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.run_files import find_adapter, find_run

SHELLS = ("bash", "zsh", "fish")
_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "fish": "(__fish_complete_path (commandline -ct))"}
"""Completion of a path, as `shtab.FILE`."""
_PATHS = ("resume", "run", "adapter", "ckpt_path", "from_adapter", "root", "data.root", "run.root")
"""Options that take a path as a text."""


def completion_verb(args: list[str]) -> int:
    """Run ``completion bash | zsh | fish``."""
    if len(args) != 1 or args[0] not in SHELLS:
        wrong = f"completion {' '.join(args)}: not one shell." if args else "completion needs a shell."
        raise UserError(
            f"{wrong}{near(args[0], SHELLS) if args else ''} Use: randlora-pl completion {' | '.join(SHELLS)}"
        )
    import shtab

    print(shtab.complete(whole_parser(), args[0]))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return a parser of all commands with their options and choices, without importing PyTorch."""
    from randlora_pl.commands.main import GROUPS, PAGE, VERBS
    from randlora_pl.run.options.run_options import run_options

    root = argparse.ArgumentParser(prog="randlora-pl")
    root.add_argument("--version", action="store_true")
    commands = root.add_subparsers()
    for verb, path in VERBS.items():
        parents = []
        if verb in ("fit", "validate", "test"):
            parents = [run_options(verb)]
            _complete_paths(parents[0])
        elif verb not in (*GROUPS, "config", "completion"):
            parents = [_parser_of(path)]
        parser = commands.add_parser(verb, parents=parents, add_help=False, help=_about(verb, PAGE))
        if verb == "completion":
            parser.add_argument("shell", choices=SHELLS)
        elif verb == "config":
            _add_config(parser)
        elif verb in GROUPS:
            group, inner = import_module(f"randlora_pl.commands.{verb}.verbs"), parser.add_subparsers()
            for name, own in group.VERBS.items():
                about = _about(name, getattr(group, "PAGE", TEXTS.get(verb, "")))
                inner.add_parser(name, parents=[_parser_of(own)], add_help=False, help=about)
    return root


def _add_config(parser: argparse.ArgumentParser) -> None:
    inner, names = parser.add_subparsers(), list(config_names())
    inner.add_parser("list", help="list bundled configs").add_argument("--json", action="store_true")
    inner.add_parser("check", help="find mistakes").add_argument("file").complete = _FILE  # type: ignore[attr-defined]
    for name in ("cat", "cp"):
        inner.add_parser(name, help=f"{name} a bundled config").add_argument("name", choices=names)


def _about(name: str, page: str) -> str:
    """Return what a help page says of a command, without signs that shells and argparse read."""
    found = re.search(rf"\b{name}\b.*?  +(\S.*)$", page, re.MULTILINE)
    return re.sub(r"[^\w ,()/=+-]", "", found[1]) if found else name


def _parser_of(path: str) -> CommandParser:
    """Return the parser of the command at ``module:function``, which its function makes first."""
    module, _, name = path.partition(":")
    function: Callable[[list[str]], int] = getattr(import_module(f"randlora_pl.commands.{module}"), name)
    CommandParser.describing = True
    try:
        function([])
    except Described as found:
        parser: CommandParser = found.args[0]
    finally:
        CommandParser.describing = False
    _complete_paths(parser)
    return parser


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let the shell complete the paths of files, runs and adapters."""
    for action in parser._actions:
        a_path = isinstance(action.type, type) and issubclass(action.type, Path)
        if a_path or action.type in (find_adapter, find_run) or action.dest in _PATHS:
            action.complete = _FILE  # type: ignore[attr-defined]
