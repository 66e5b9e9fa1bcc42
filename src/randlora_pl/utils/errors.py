"""Errors that a user can mend: the command line prints them in one or two lines and exits with 2."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """A mistake of the user, printed in one or two lines without a traceback.

    The parts stay apart, also when a worker process sends the error to another: no code has to read the text.

    Args:
        what: The fault, and usually its place.
        hint: The remedy, with the command. It has a line of its own unless ``what`` ends a sentence.
        where: The file, option or entry at fault; printed unless ``what`` has it.
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

    def within(self, place: object) -> "UserError":
        """Return the error with a place in front, unless it is there already."""
        what = self.what if self.where == str(place) else f"{place}: {self.what}"
        return type(self)(what, self.hint, self.where or str(place))


@contextlib.contextmanager
def errors_in(place: object) -> Iterator[None]:
    """Put a place, such as a file or an entry of a config, in front of a `UserError`."""
    try:
        yield
    except UserError as error:
        raise error.within(place) from error


class UnreadableImageError(UserError):
    """An image cannot be decoded."""


class TooLargeImageError(UnreadableImageError):
    """An image has more pixels than are allowed."""


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


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error, with the next one if a colon announces it."""
    first, *others = (str(error).strip() or type(error).__name__).splitlines()
    return (f"{first} {others[0].strip()}" if others and first.endswith(":") else first)[:160]
