"""Filters for third-party warnings that the user cannot act on."""

import logging
import os
import warnings

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


def silence_library_warnings() -> None:
    """Silence warnings that the user cannot act on, and set passive OpenMP waiting; call before importing PyTorch.

    By default OpenMP threads spin while they wait for each other. With another load on the same cores, training took
    ten times as long (2 cores, 2 threads).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    filter_library_warnings()
