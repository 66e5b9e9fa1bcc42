"""What a run says: on the terminal, and in the ``run.log`` of its folder."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from randlora_pl.utils.text.log_filters import filter_library_warnings
from randlora_pl.utils.text.printable import printable

_log = logging.getLogger("randlora_pl")
_PRINTED = "printed"
_WIDTH = 120


def print_above_progress(*what: RenderableType) -> None:
    """Print text or rich tables; the log gets the same without colours."""
    plain = io.StringIO()
    settings: dict[str, Any] = {"force_jupyter": False}  # in a notebook rich would leave the streams alone
    terminal = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, **settings)
    for console in (terminal, Console(file=plain, width=_WIDTH, no_color=True, **settings)):
        for item in what:  # text is not broken, so that commands in it can be copied
            shown = printable(item) if isinstance(item, str) else item
            console.print(shown, highlight=False, markup=False, soft_wrap=isinstance(item, str))
    _log.info("\n%s", plain.getvalue().rstrip("\n"), extra={_PRINTED: True})


class _Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Remarks of the application on stderr; what `say` has printed is not repeated."""

    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, _PRINTED):
            self.stream = sys.stderr  # the current one, which a test or a notebook may have replaced
            super().emit(record)


class _Plain(logging.Formatter):
    """One remark, fit for a terminal whatever names are in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The remark."""
        return printable(super().format(record))


class _RunLog(logging.FileHandler):
    """A log that gives way where the disk is full: something that matters more fails then, too, and is told."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Says nothing of what could not be written."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Writes what is left, if there is room."""
        with suppress(OSError):
            super().close()


def log_to_terminal() -> None:
    """Show remarks of the application, and only warnings of Lightning."""
    if not any(isinstance(handler, _Terminal) for handler in _log.handlers):
        handler = _Terminal(sys.stderr)
        handler.setFormatter(_Plain("randlora-pl: %(message)s"))
        _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False
    filter_library_warnings()


@contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Append everything that the application and Lightning say to a file."""
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
