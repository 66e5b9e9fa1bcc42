"""Help pages as the program prints them."""

import io
from contextlib import redirect_stdout

from randlora_pl.commands.main import COMMANDS, main, members


def help_page(command: str) -> str:
    """What a command prints for ``--help``."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main([*command.split(), "--help"]) == 0
    return printed.getvalue()


def help_pages() -> dict[str, str]:
    """The help page of every command and group."""
    names = [f"{name} {member}" for name in COMMANDS for member in members(name)]
    return {name: help_page(name) for name in [*COMMANDS, *names]}
