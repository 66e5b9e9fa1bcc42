"""Errors that the user can fix: the command line prints them in one or two lines and exits with code 2; and the log."""

import contextlib
import difflib
import logging
from collections.abc import Iterable, Iterator

log = logging.getLogger("randlora_pl")
"""The log of the application, whose warnings the user reads, too."""


class UserError(Exception):
    """A mistake of the user, printed in one or two lines without a traceback.

    The parts are separate attributes, also after pickling, so that no code has to parse the message.

    Args:
        what: Description of the mistake, usually with its location.
        hint: Fix, with the command. It is printed on its own line unless ``what`` ends a sentence.
        where: File, option or entry with the mistake; printed unless ``what`` contains it.
    """

    def __init__(self, what: str, hint: str = "", where: str = "") -> None:
        super().__init__(what, hint, where)
        self.what, self.hint, self.where = what, hint, where

    def __str__(self) -> str:
        text = self.what
        if self.where not in text:
            stop = "." if text.endswith(".") else ""
            text = f"{text.removesuffix('.')} in {self.where}{stop}"
        gap = " " if text.endswith((".", "?", "!")) else "\n"
        return f"{text}{gap}{self.hint}" if self.hint else text

    def within(self, location: object) -> "UserError":
        """Return the error with a location in front, unless it has this location already."""
        what = self.what if self.where == str(location) else f"{location}: {self.what}"
        return type(self)(what, self.hint, self.where or str(location))


@contextlib.contextmanager
def errors_in(location: object) -> Iterator[None]:
    """Put a location, such as a file or a config entry, in front of each `UserError` of the block."""
    try:
        yield
    except UserError as error:
        raise error.within(location) from error


class UnreadableImageError(UserError):
    """Error for an image that cannot be decoded."""


class TooLargeImageError(UnreadableImageError):
    """Error for an image with more pixels than allowed."""


class LostProcessError(Exception):
    """Error for a lost process of a distributed run, with the command to resume in the message. Exit code 1."""


class Terminated(KeyboardInterrupt):
    """Exception for SIGTERM, which batch systems send; handled like Ctrl-C, exit code 143."""


class DryRunEnd(Exception):  # noqa: N818 (not an error)
    """End of ``fit --dry-run``, after its start page."""


def near(word: str, choices: Iterable[str], count: int = 3) -> str:
    """Return a suggestion such as `` Did you mean 'digits'?``, or an empty string if no choice is similar.

    Args:
        word: Word that the user typed.
        choices: Accepted words.
        count: Maximum number of suggestions.
    """
    lowered = {choice.lower(): choice for choice in choices}
    matches = [lowered[match] for match in difflib.get_close_matches(word.lower()[:100], lowered, count, 0.5)]
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def brief(value: object, longest: int = 80) -> str:
    """Return the ``repr`` of a value, shortened so that a message does not contain a whole file.

    Args:
        value: Value that the user gave.
        longest: Maximum number of characters.
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, or a list in a list in a list ...
        text = f"a {type(value).__name__} too large to show"
    return shorten(text, longest)


def shorten(text: str, longest: int) -> str:
    """Return a text of at most this many characters, with ``...`` in the place of its middle."""
    end = longest // 4
    return text if len(text) <= longest else f"{text[: longest - end - 5]} ... {text[len(text) - end :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, and the second one if the first ends with a colon."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {others[0].strip()}" if others and first.endswith(":") else first)[:160]
