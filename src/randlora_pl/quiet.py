"""Remarks of Lightning and PyTorch that a user can do nothing about."""

import logging
import warnings

_REMARKS = (
    ".*does not have many workers.*",
    ".*across ranks is zero.*",  # there is nothing to validate on, which the start summary says
    ".*number of training batches.*",
    ".*in eval mode at the start of training.*",  # what is frozen stays in eval mode
    ".*isinstance.treespec, LeafSpec.*",
)


def ignore_remarks() -> None:
    """Hides these remarks, and what Lightning says below a warning, in this process from now on."""
    for text in _REMARKS:
        warnings.filterwarnings("ignore", text)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
