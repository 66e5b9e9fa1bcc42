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
    found = [lowered[match] for match in difflib.get_close_matches(word.lower()[:100], lowered, count, 0.5)]
    return f" Did you mean {' or '.join(repr(match) for match in found)}?" if found else ""


def brief(value: object, longest: int = 80) -> str:
    """A value as Python writes it, cut in the middle where it is long: a message must not hold all of a file.

    Args:
        value: What the user gave.
        longest: Characters of the result.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, or a list in a list in a list ...
        text = f"a {type(value).__name__} too large to show"
    return shortened(text, longest)


def shortened(text: str, longest: int) -> str:
    """A text cut in the middle where it has more than this many characters."""
    end = longest // 4
    return text if len(text) <= longest else f"{text[: longest - end - 5]} ... {text[len(text) - end :]}"
