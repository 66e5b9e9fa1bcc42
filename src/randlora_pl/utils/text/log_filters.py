"""Filters for third-party warnings that the user cannot act on."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_WARNINGS = (
    ".*does not have many workers.*",
    ".*across ranks is zero.*",  # no validation data; the start summary reports it
    ".*number of training batches.*",
    ".*in eval mode at the start of training.*",  # frozen modules stay in eval mode
    ".*isinstance.treespec, LeafSpec.*",
)
_MODULES = (r"PIL\.",)  # damaged EXIF tags; image sizes are limited elsewhere


def filter_library_warnings() -> None:
    """Hide these warnings, and Lightning's logs below warning level, for the rest of the process."""
    for text in _WARNINGS:
        warnings.filterwarnings("ignore", text)
    for module in _MODULES:
        warnings.filterwarnings("ignore", module=module)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


_TRIES = re.compile(r"thrown while requesting|Retrying in |Rate limited")


@contextmanager
def collapse_hub_retries() -> Iterator[None]:
    """Log one message if the Hugging Face Hub is unreachable, instead of two per retry of huggingface_hub.

    The filter is on the logger that emits the messages, because filters of parent loggers do not apply to them.
    """
    reported = False

    def hold(record: logging.LogRecord) -> bool:
        nonlocal reported
        if not _TRIES.search(record.getMessage()):
            return True
        if not reported:
            reported = True
            logging.getLogger("randlora_pl").warning(
                "The Hugging Face Hub does not answer; retrying. On a machine without a network, set HF_HUB_OFFLINE=1 "
                "to skip the retries."
            )
        return False

    library = logging.getLogger("huggingface_hub.utils._http")
    library.addFilter(hold)
    try:
        yield
    finally:
        library.removeFilter(hold)


def silence_library_warnings() -> None:
    """Silence warnings that the user cannot act on, and set passive OpenMP waiting; call before importing PyTorch.

    By default OpenMP threads spin while they wait for each other. With another load on the same cores, training took
    ten times as long (2 cores, 2 threads).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    filter_library_warnings()
