"""Parser of options with one-line errors and near names, and checks that several commands make."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from randlora_pl.utils.errors import UserError, near


class CommandParser(argparse.ArgumentParser):
    """Parser of the options of one command.

    Args:
        verb: The typed command, for messages.
    """

    def __init__(self, verb: str) -> None:
        super().__init__(prog=f"randlora-pl {verb}", add_help=False, allow_abbrev=False)
        self.verb = verb

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the options, typed with ``-`` or ``_``, and the other words."""
        known = {name.replace("_", "-"): name for name in self._option_string_actions}
        split = [word.partition("=") for word in args or ()]
        words = [f"{known.get(name.replace('_', '-'), name)}{equals}{value}" for name, equals, value in split]
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise an error of one line instead of printing the usage.

        Raises:
            UserError: Always.
        """
        hint = ""
        if "unrecognized" in message:
            unknown = message.removeprefix("unrecognized arguments: ").split()[0]
            options = [action.option_strings[0] for action in self._actions if action.option_strings]
            hint = near(unknown.partition("=")[0], options) if unknown.startswith("-") else ""
        elif wrong := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
            hint = near(wrong[1], re.findall(r"[^', ]+", wrong[2]))
        raise UserError(f"{self.verb}: {message}.{hint} See: randlora-pl {self.verb} --help")


def print_json(found: object) -> None:
    """Print a listing for another program."""
    print(json.dumps(found, indent=2, ensure_ascii=False, default=str))


def spelled(name: str) -> str:
    """Return an option as the user types it."""
    return f"--{name.replace('_', '-')}"


def check_output(path: Path, overwrite: bool | None = None) -> None:
    """Refuse an output that exists, unless ``--overwrite`` is given; None if the command has no such option."""
    if path.exists() and not overwrite:
        instead = "nothing is overwritten" if overwrite is None else "or --overwrite to replace it"
        raise UserError(f"{path} exists; give another --output, {instead}.")


def check_parent(path: Path) -> None:
    """Refuse a file whose folder does not exist."""
    if not path.parent.is_dir():
        raise UserError(f"The folder {path.parent} does not exist; make it first: mkdir -p {path.parent}")
