"""Output of a run: on the terminal, and in ``run.log`` of its folder; without warnings of libraries."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from randlora_pl.utils.text.formatting import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

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
