r"""Escaping of text from files for terminals, plots and spreadsheets."""

import re
import sys

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, bidirectional marks, and bytes that are not UTF-8."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def printable(text: str) -> str:
    r"""Return a text with escaped control characters, such as ``\x1b``; tabs and newlines stay.

    Args:
        text: Text; it may contain bytes that are not UTF-8 (surrogate escapes of file names).
    """
    return _COMMANDS.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def for_figure(text: str) -> str:
    """Return a text that matplotlib draws literally: dollar signs are escaped."""
    return printable(text).replace("$", r"\$")


def for_cell(text: str) -> str:
    """Return a table cell that no spreadsheet evaluates: text that starts like a formula gets an apostrophe.

    Args:
        text: Text of the cell; numbers are not changed.
    """
    formula = text.lstrip().startswith(("=", "+", "-", "@")) and not _NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def escape_unprintable_output() -> None:
    """Let the standard streams escape characters that their encoding lacks instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # streams of notebooks lack it
            stream.reconfigure(errors="backslashreplace")
