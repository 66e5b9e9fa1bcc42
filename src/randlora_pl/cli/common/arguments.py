"""Parser of options with one-line errors and near names."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.files.weights_files import register_weights


class Parser(argparse.ArgumentParser):
    """Parser of the options of one command.

    Args:
        verb: The typed command, for messages.
        page: The command whose help explains the options; by default itself.
    """

    def __init__(self, verb: str, page: str | None = None) -> None:
        super().__init__(prog=f"randlora-pl {verb}", add_help=False, allow_abbrev=False)
        self.verb, self.page = verb, page or verb

    def add_weights(self) -> None:
        """Add the option for the weights file of an adapter's base model."""
        self.add_argument("--pretrained", dest="weights_files", type=Path, action="append")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Return the options; pass a weights file among them to `find_weights`."""
        parsed = super().parse_args(args, namespace)
        if files := getattr(parsed, "weights_files", None):
            register_weights(files)
        return parsed

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
        raise UserError(f"{self.verb}: {message}.{hint} See: randlora-pl {self.page} --help")
