"""Parser of options with one-line errors and near names, and checks, devices and advice that several commands share."""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from randlora_pl.run.error_messages import out_of_memory
from randlora_pl.utils.errors import TooLargeImageError, UnreadableImageError, UserError, near


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


def pick_device(name: str) -> Any:
    """Return a device of this machine; ``auto`` selects the fastest one, others are refused if they do not exist."""
    import torch

    there = ["cuda"] if torch.cuda.is_available() else []
    there += ["mps"] if torch.backends.mps.is_available() else []
    there += ["cpu"]
    if name == "auto":
        return torch.device(there[0])
    if name.partition(":")[0] not in there:
        raise UserError(f"--device {name} is not on this machine; there is {', '.join(there)}.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: give cpu, cuda, cuda:1 and so on.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"--device {name} is not on this machine; the last one is {device.type}:{count - 1}.")
    return device


@contextmanager
def advised(smaller: str, unreadable: str = "", too_large: str = "") -> Iterator[None]:
    """Raise errors of one line, with advice, for what can go wrong while a model works.

    Args:
        smaller: Option to try if memory runs out.
        unreadable: What to do about an image that cannot be read.
        too_large: What to do about an image that is too large, if something else.
    """
    try:
        yield
    except UnreadableImageError as error:
        hint = too_large if too_large and isinstance(error, TooLargeImageError) else unreadable
        raise UserError(error.what, hint, error.where) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory; try {smaller}") from error
