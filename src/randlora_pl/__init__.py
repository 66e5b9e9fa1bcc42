"""randlora-pl: full-rank parameter-efficient fine-tuning as a PyTorch Lightning application."""

from typing import TYPE_CHECKING

from randlora_pl.utils.lazy import lazy_exports
from randlora_pl.utils.version import __version__

if TYPE_CHECKING:
    from randlora_pl.run.api import fit

__all__ = ["__version__", "fit"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)  # `fit` imports PyTorch, which most commands do without
