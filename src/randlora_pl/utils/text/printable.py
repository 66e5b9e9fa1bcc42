r"""Texts from files made fit to print: what a terminal or a figure would take for a command is spelled out."""

import re
import sys

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that turn the direction of writing, and bytes that are not UTF-8."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def printable(text: str) -> str:
    r"""Return a text with its control characters spelled out, such as ``\x1b``; tabs and newlines stay.

    Args:
        text: It may hold bytes that are not UTF-8, as Python reads them from file names.
    """
    return _COMMANDS.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def for_figure(text: str) -> str:
    """Return a text that matplotlib draws as it is: a dollar sign begins no formula."""
    return printable(text).replace("$", r"\$")


def for_cell(text: str) -> str:
    """Return a cell of a table that no spreadsheet takes for a formula: one that begins like it gets an apostrophe.

    Args:
        text: A number stays as it is.
    """
    formula = text.lstrip().startswith(("=", "+", "-", "@")) and not _NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def escape_unprintable_output() -> None:
    """Has the standard streams spell out what their encoding lacks, where printing it would end the program."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
