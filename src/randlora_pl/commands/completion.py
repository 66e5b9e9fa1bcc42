"""``completion``: a script for the shell; shtab writes it from the parsers of the commands."""

import argparse
import re
import sys
from typing import Annotated, Any, Literal

import shtab

from randlora_pl.commands.common.command import Command
from randlora_pl.commands.table import COMMANDS, function_of, members, summary
from randlora_pl.run.options.shipped import config_names
from randlora_pl.utils.options import Option


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Option("SHELL", "The shell")]) -> int:
    """Print a script that lets the shell complete commands, options and choices.

    Examples:
        randlora-pl completion bash > ~/.local/share/bash-completion/completions/randlora-pl
        randlora-pl completion zsh > ~/.zfunc/_randlora-pl           with fpath+=~/.zfunc before compinit in ~/.zshrc
        randlora-pl completion fish > ~/.config/fish/completions/randlora-pl.fish
    """
    print(shtab.complete(whole_parser(), shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """Return a parser of all commands with their options and choices."""
    root = argparse.ArgumentParser(prog="randlora-pl")
    root.add_argument("--version", action="store_true")
    commands = root.add_subparsers()
    for name in COMMANDS:
        if inner := members(name):
            group = commands.add_parser(name, add_help=False, help=_plain(summary(name))).add_subparsers()
            for member in inner:
                _add(group, member, f"{name} {member}")
        else:
            _add(commands, name, name)
    return root


def _add(commands: Any, typed: str, name: str) -> None:
    command = Command(name, function_of(name))
    if command.raw:  # it reads its words itself, and has a parser in its module
        parser: argparse.ArgumentParser = sys.modules[command.function.__module__].parser(name)
    else:
        parser = command.parser()
    for action in parser._actions:
        action.help = _plain(action.help or "")
        paths = ("resume", "run", "adapter", "ckpt_path", "from_adapter", "root", "data.root", "run.root")
        if action.dest in paths or action.metavar in ("ADAPTER", "DIR", "FILE", "PATH", "RUN", "[NAME=]PATH"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "CONFIG":
            action.choices = list(config_names())
    commands.add_parser(typed, parents=[parser], add_help=False, help=_plain(summary(name)))


def _plain(text: str) -> str:
    """Return a text without signs that shells and argparse read."""
    return re.sub(r"[^\w ,()/=+-]", "", text)
