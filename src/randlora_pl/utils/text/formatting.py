"""Durations, sizes, and text from files as text that terminals, plots and spreadsheets show safely."""

import base64
import re
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # quick commands do without
    import numpy as np
    from numpy.typing import NDArray


def duration(seconds: float, digits: int = 0) -> str:
    """Return a duration as text: ``18 s``, ``3 min``, ``2 h 05 min``, ``31 h`` or ``1,200 days``.

    Args:
        seconds: Duration in seconds.
        digits: Decimals of durations below 90 seconds.
    """
    if seconds < 90:
        return f"{seconds:.{digits}f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 600:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours} h" if hours < 72 else f"{round(hours / 24):,} days"


def byte_size(count: float) -> str:
    """Return a number of bytes as text: ``999 bytes``, ``1.0 kB``, ``170.5 MB`` or ``37.0 GB`` of 10⁹ bytes."""
    for unit, digits in (("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 10**digits:
            return f"{count / 10**digits:,.1f} {unit}"
    return f"{count:.0f} bytes"


_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, bidirectional marks, and bytes that are not UTF-8."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def printable(text: str) -> str:
    r"""Return a text with escaped control characters, such as ``\x1b``; tabs and newlines stay."""

    def spelled(match: re.Match[str]) -> str:
        code = ord(match[0])
        code -= 0xDC00 if 0xDC80 <= code <= 0xDCFF else 0
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _COMMANDS.sub(spelled, text)


def for_figure(text: str) -> str:
    """Return a text that matplotlib draws literally: dollar signs are escaped."""
    return printable(text).replace("$", r"\$")


def for_cell(text: str) -> str:
    """Return a table cell that no spreadsheet evaluates: text that starts like a formula gets an apostrophe."""
    formula = text.lstrip().startswith(("=", "+", "-", "@")) and not _NUMBER.fullmatch(text)
    return f"'{text}" if formula else text


def escape_unprintable_output() -> None:
    """Let the standard streams escape characters that their encoding lacks instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # streams of notebooks lack it
            stream.reconfigure(errors="backslashreplace")


MOST_PACKED = 100_000
"""Largest number of values for `packed`: 17 kB of text."""


def packed(values: list[bool]) -> str:
    """Return the number of values, a colon, and yes or no for each as a bit, in base64: a sixth of a letter each."""
    import numpy as np

    return f"{len(values)}:{base64.b64encode(np.packbits(values).tobytes()).decode()}"


def unpacked(text: object) -> "NDArray[np.bool_] | None":
    """Return the values of a text that `packed` made; None for anything else."""
    import numpy as np

    count, _, bits = text.partition(":") if isinstance(text, str) else ("", "", "")
    short = len(count) <= len(str(MOST_PACKED)) and len(bits) <= MOST_PACKED // 4
    if not (short and count.isascii() and count.isdigit()):
        return None
    try:
        data = np.frombuffer(base64.b64decode(bits, validate=True), np.uint8)
    except ValueError:
        return None
    return np.unpackbits(data, count=int(count)).astype(bool) if len(data) == -(-int(count) // 8) else None
