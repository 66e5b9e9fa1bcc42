"""Dispatch of commands that have commands of their own."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.text.console import silence_library_warnings


def dispatch(
    group: str,
    verbs: Mapping[str, str],
    page: str,
    args: list[str],
    pages: Mapping[str, str] | None = None,
    logs: bool = True,
) -> int:
    """Run a command of a group, or print the help of the group or the command.

    Args:
        group: Name of the group, as it is typed.
        verbs: ``module:function`` of each command; the module is imported when the command is typed.
        page: The help page of the group.
        args: The words behind the group's name.
        pages: Help page of each command; by default the PAGE of its module, else the page of the group.
        logs: True if the application's log is shown on the terminal.

    Returns:
        The exit code: 2 for a command without words if its module has a PAGE, which is printed then.

    Raises:
        UserError: The command is unknown.
    """
    asked = {"--help", "-h"} & set(args)
    if not args or args[0] in asked:
        print(page, end="")
        return 0
    verb, *rest = args
    if verb not in verbs:
        raise UserError(
            f"Unknown command {group} {verb}.{near(verb, verbs)} "
            f"Use one of {', '.join(verbs)}; see: randlora-pl {group} --help"
        )
    if asked and pages:
        print(pages[verb], end="")
        return 0
    module, _, name = verbs[verb].partition(":")
    there: Any = import_module(f"randlora_pl.commands.{module}")
    own = getattr(there, "PAGE", None)
    if asked or (own and not rest):
        print(own or page, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    silence_library_warnings()
    if logs:
        from randlora_pl.utils.text.console import log_to_terminal

        log_to_terminal()
    function: Callable[[list[str]], int] = getattr(there, name)
    return function(rest)
