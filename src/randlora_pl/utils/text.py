"""Text output: on the terminal and in a run's log, tables, sizes and durations, and unprintable text made safe."""

import base64
import csv
import io
import logging
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # quick commands do without
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import RenderableType
    from rich.table import Table


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
"""Largest number of values for `pack_bits`: 17 kB of text."""


def pack_bits(values: list[bool]) -> str:
    """Return the number of values, a colon, and yes or no for each as a bit, in base64: a sixth of a letter each."""
    import numpy as np

    return f"{len(values)}:{base64.b64encode(np.packbits(values).tobytes()).decode()}"


def unpack_bits(text: object) -> "NDArray[np.bool_] | None":
    """Return the values of a text that `pack_bits` made; None for anything else."""
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


_GAP = "  "
_SHORT = 10
"""Columns of so few letters are wrapped last."""


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], optional: Sequence[str] = (), right: Collection[int] = ()
) -> str:
    """Return a plain table, whose columns are wrapped to fit a terminal, but not in a file or a pipe.

    rich would take 0.8 s for the 1,400 rows of ``models --all``, and shortens numbers next to long names.

    Args:
        header: Titles of the columns.
        rows: Cells, as many per row as titles; None is shown as an empty cell.
        optional: Titles of columns that a narrow terminal leaves out, the first one first.
        right: Indices of right-aligned columns.
    """
    columns = [list(map(_plain, column)) for column in zip(header, *rows, strict=True)]
    widths, omitted, note = [max(map(len, column)) for column in columns], [], []
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        terminal = shutil.get_terminal_size((120, 24)).columns
        room = terminal - len(_GAP) * (len(columns) - 1)
        longest = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
        for title in filter(header.__contains__, optional):
            if sum(min(width, max(24, word)) for width, word in zip(widths, longest, strict=True)) <= room:
                break  # all are readable: wrapped to 24 letters or more
            for index in (index for index, other in enumerate(header) if other == title):
                widths[index] = longest[index] = 0
                room += len(_GAP)
            omitted.append(title)
        widths = _shrink(widths, longest, room)
        if omitted:
            note = textwrap.wrap(f"(left out to fit the terminal: {', '.join(omitted)})", max(1, terminal))
    kept = [index for index, width in enumerate(widths) if header[index] not in omitted]
    lines = []
    for row in zip(*columns, strict=True):
        wrapped = {i: [row[i]] for i in kept}
        for index in (index for index in kept if len(row[index]) > widths[index]):
            wrapped[index] = textwrap.wrap(row[index], widths[index], break_on_hyphens=False)
        for parts in zip_longest(*wrapped.values(), fillvalue=""):
            cells = zip(kept, parts, strict=True)
            aligned = [part.rjust(widths[i]) if i in right else part.ljust(widths[i]) for i, part in cells]
            lines.append(_GAP.join(aligned).rstrip())
    return "\n".join([*lines, *note])


def _plain(cell: object) -> str:
    return "" if cell is None else printable(str(cell)).replace("\n", "\\n")


def _shrink(widths: Sequence[int], longest: Sequence[int], room: int) -> list[int]:
    """Return widths whose sum fits the room: the widest column shrinks first, long words are broken after spaces."""
    whole = [width if width <= _SHORT else word for width, word in zip(widths, longest, strict=True)]
    fitting = [min(width, max(1, room)) for width in widths]
    for least in (whole, [max(1, min(width, room // 2)) for width in whole], [1] * len(widths)):
        while sum(fitting) > room and (wide := [i for i, width in enumerate(fitting) if width > least[i]]):
            fitting[max(wide, key=fitting.__getitem__)] -= 1
    return fitting


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Return the lines of a Markdown table.

    pandas' own writer needs another package, pads every cell to the widest, and aligns by the type of a column.

    Args:
        header: Titles of the columns.
        rows: Cells as Markdown, as many per row as titles.
        left: Columns of words, which are left-aligned; the others hold numbers.
    """
    rules = ["---" if column in left else "---:" for column in range(len(header))]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]


def facts_table(facts: Mapping[str, str]) -> "Table":
    """Return a rich table of two columns, names in bold next to their texts; facts without a text are left out."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in facts.items():
        if text:
            table.add_row(name, text)
    return table


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    r"""Return rows as CSV text with line feeds.

    Cells that look like spreadsheet formulas are escaped, and so are bytes that are not UTF-8 (``\udcff``).
    """
    lines: list[str] = []
    # With lineterminator="\n", the writer of Python 3.11 does not quote a lone carriage return, which readers treat as
    # the end of the line.
    stream = SimpleNamespace(write=lambda line: lines.append(line.removesuffix("\r\n") + "\n"))
    csv.writer(stream).writerows([for_cell(c) if isinstance(c, str) else c for c in row] for row in rows)
    return "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


_LAYER_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


def star(name: str) -> str:
    """Return a layer's name with a star in place of each number that a dot follows.

    Examples:
        >>> star("layers.0.1.mlp.fc1")
        'layers.*.*.mlp.fc1'
    """
    return _LAYER_NUMBER.sub("*", name)


def group_names(names: Iterable[tuple[str, Hashable]]) -> dict[tuple[str, Hashable], list[int]]:
    """Return the positions of each group by its pattern and kind; groups of one kind and pattern belong together.

    Groups of another kind with the same pattern keep the numbers in which they differ.

    Examples:
        >>> list(group_names([("a.0.b.0.fc", 3), ("a.0.b.1.fc", 3), ("a.1.b.0.fc", 5)]))
        [('a.0.b.*.fc', 3), ('a.1.b.*.fc', 5)]
    """
    listed = list(names)
    groups: dict[tuple[str, Hashable], list[int]] = {}
    for position, (name, kind) in enumerate(listed):
        groups.setdefault((star(name), kind), []).append(position)
    numbers = {key: _numbers(listed[position][0] for position in positions) for key, positions in groups.items()}
    patterns = {}
    for (pattern, kind), positions in groups.items():
        together = [own for key, own in numbers.items() if key[0] == pattern]
        words = _words(numbers[pattern, kind], list(zip(*together, strict=True)))
        alone = len(positions) == 1 and len(together) == 1
        shown = listed[positions[0]][0] if alone else pattern.replace("%", "%%").replace("*", "%s") % tuple(words)
        patterns[shown, kind] = positions
    return patterns


def _words(own: list[list[int]], places: list[tuple[list[int], ...]]) -> list[str]:
    """Return a star or numbers for each place of a group; ``places`` has the numbers of all groups of the pattern."""
    apart = [place for place, sets in enumerate(places) if len(set().union(*sets)) == sum(map(len, sets))]
    differ = apart[:1] or [place for place, sets in enumerate(places) if any(each != sets[0] for each in sets)]
    shown = differ if len(places) and len(places[0]) > 1 else []
    return [_listed(values) if place in shown else "*" for place, values in enumerate(own)]


def _numbers(names: Iterable[str]) -> list[list[int]]:
    """Return the numbers at each place of names of one pattern, sorted."""
    places = zip(*(_LAYER_NUMBER.findall(name) for name in names), strict=True)
    return [sorted(set(map(int, values))) for values in places]


def _listed(values: list[int]) -> str:
    """Return numbers as text: ``3``, ``{0,2}`` or ``{1-5}``."""
    if len(values) == 1:
        return str(values[0])
    whole = len(values) > 2 and values[-1] - values[0] == len(values) - 1
    return f"{{{values[0]}-{values[-1]}}}" if whole else f"{{{','.join(map(str, values))}}}"


_log = logging.getLogger("randlora_pl")
_PRINTED = "printed"
_WIDTH = 120


def print_above_progress(*what: "RenderableType") -> str:
    """Print text or rich tables, log them without colors, and return what was logged."""
    from rich.console import Console

    plain = io.StringIO()
    settings: dict[str, Any] = {"force_jupyter": False}  # in a notebook rich would bypass the streams
    terminal = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, **settings)
    for console in (terminal, Console(file=plain, width=_WIDTH, no_color=True, **settings)):
        for item in what:  # no line breaks in text, so that commands can be copied
            shown = printable(item) if isinstance(item, str) else item
            console.print(shown, highlight=False, markup=False, soft_wrap=isinstance(item, str))
    text = plain.getvalue().rstrip("\n")
    _log.info("\n%s", text, extra={_PRINTED: True})
    return text


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler for the application's log on stderr, as printable text; `print_above_progress` has printed its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, _PRINTED):
            self.stream = sys.stderr  # the current one, which a test or a notebook may have replaced
            super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _RunLog(logging.FileHandler):
    """File handler that ignores a full disk; the failing checkpoint reports it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Ignore OSError."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Flush and close the file; ignore OSError."""
        with suppress(OSError):
            super().close()


def log_to_terminal() -> None:
    """Show the application's log, and only warnings from Lightning."""
    if not any(isinstance(handler, _Terminal) for handler in _log.handlers):
        handler = _Terminal(sys.stderr)
        handler.setFormatter(logging.Formatter("randlora-pl: %(message)s"))
        _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    filter_library_warnings()


@contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Append the logs of the application and of Lightning to a file."""
    handler = _RunLog(file, encoding="utf-8", delay=True, errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [_log, logging.getLogger("lightning.pytorch"), logging.getLogger("py.warnings")]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()


_WARNINGS = (
    ".*does not have many workers.*",
    ".*across ranks is zero.*",  # no validation data; the start summary reports it
    ".*number of training batches.*",
    ".*in eval mode at the start of training.*",  # frozen modules stay in eval mode
    ".*isinstance.treespec, LeafSpec.*",
    "No positive samples found.*",  # a class without images; the start of a run has it
)


def filter_library_warnings() -> None:
    """Hide these warnings, and Lightning's logs below warning level, for the rest of the process."""
    for text in _WARNINGS:
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # damaged EXIF tags; image sizes are limited elsewhere
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def silence_library_warnings() -> None:
    """Silence warnings that the user cannot act on, and set passive OpenMP waiting; call before importing PyTorch.

    By default OpenMP threads spin while they wait for each other. With another load on the same cores, training took
    ten times as long (2 cores, 2 threads).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    filter_library_warnings()
