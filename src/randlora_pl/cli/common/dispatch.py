"""Dispatch of commands that have commands of their own."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from randlora_pl.utils.errors import UserError, near
from randlora_pl.utils.text.log_filters import silence_library_warnings


def dispatch(
    group: str, verbs: Mapping[str, str], page: str, args: list[str], paged: bool = True, logs: bool = True
) -> int:
    """Run a command of a group, or print the help of the group or the command.

    Args:
        group: Name of the group, as it is typed.
        verbs: ``module:function`` of each command; the module is imported when the command is typed.
        page: The help page of the group.
        args: The words behind the group's name.
        paged: True if each module has a PAGE, which is printed for a command without words.
        logs: True if the application's log is shown on the terminal.

    Returns:
        The exit code.

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
    module, _, name = verbs[verb].partition(":")
    there: Any = import_module(f"randlora_pl.cli.{module}")
    if paged and (asked or not rest):
        print(there.PAGE, end="")
        return 0
    silence_library_warnings()
    if logs:
        from randlora_pl.utils.text.console import log_to_terminal

        log_to_terminal()
    function: Callable[[list[str]], int] = getattr(there, name)
    return function(rest)
