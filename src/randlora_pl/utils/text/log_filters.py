"""Remarks of other libraries that a user can do nothing about."""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


_REMARKS = (
    ".*does not have many workers.*",
    ".*across ranks is zero.*",  # there is nothing to validate on, which the start summary says
    ".*number of training batches.*",
    ".*in eval mode at the start of training.*",  # what is frozen stays in eval mode
    ".*isinstance.treespec, LeafSpec.*",
)
_MODULES = (r"PIL\.",)  # damaged EXIF tags; images have a limit of their own


def filter_library_warnings() -> None:
    """Hides these remarks, and what Lightning says below a warning, in this process from now on."""
    for text in _REMARKS:
        warnings.filterwarnings("ignore", text)
    for module in _MODULES:
        warnings.filterwarnings("ignore", module=module)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


_TRIES = re.compile(r"thrown while requesting|Retrying in |Rate limited")


@contextmanager
def collapse_hub_retries() -> Iterator[None]:
    """Says once that the Hugging Face Hub does not answer, where huggingface_hub has two lines for each of its tries.

    They come from one logger, and a filter of another does not see them.
    """
    told = False

    def hold(record: logging.LogRecord) -> bool:
        nonlocal told
        if not _TRIES.search(record.getMessage()):
            return True
        if not told:
            told = True
            logging.getLogger("randlora_pl").warning(
                "The Hugging Face Hub does not answer; trying a few times more. On a machine without a network, "
                "HF_HUB_OFFLINE=1 saves the tries."
            )
        return False

    library = logging.getLogger("huggingface_hub.utils._http")
    library.addFilter(hold)
    try:
        yield
    finally:
        library.removeFilter(hold)


def silence_library_warnings() -> None:
    """Before PyTorch is imported: no remarks that a user can do nothing about, and threads that wait calmly.

    By default OpenMP's threads spin while they wait for each other. Where anything else runs on the same
    cores, that made a training ten times slower (2 cores, 2 threads).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    filter_library_warnings()
