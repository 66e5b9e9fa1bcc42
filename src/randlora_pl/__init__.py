"""randlora-pl: full-rank parameter-efficient fine-tuning as a PyTorch Lightning application."""

from typing import TYPE_CHECKING

from randlora_pl.utils import __version__
from randlora_pl.utils.quick_imports import lazy_exports

if TYPE_CHECKING:
    from randlora_pl.run.api import fit

__all__ = ["__version__", "fit"]

__getattr__, __dir__ = lazy_exports(__name__, __file__)  # `fit` imports PyTorch, which most commands do without
