"""Errors that a user can mend: the command line prints them in one or two lines and exits with 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, where, and the next command; shown without a traceback."""


class LostProcessError(Exception):
    """Another process of a run has ended or does not answer; says which, and how to go on. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as a batch system sends it: told like Ctrl-C, exit code 143."""


def near(word: str, choices: Iterable[str], count: int = 3) -> str:
    """A suggestion such as `` Did you mean 'digits'?``, or an empty string where nothing is near.

    Args:
        word: What the user typed.
        choices: What would have been accepted.
        count: The most suggestions to make.
    """
    lowered = {choice.lower(): choice for choice in choices}
    found = [lowered[match] for match in difflib.get_close_matches(word.lower(), lowered, count, 0.5)]
    return f" Did you mean {' or '.join(repr(match) for match in found)}?" if found else ""
