"""randlora-pl: full-rank parameter-efficient fine-tuning as a PyTorch Lightning application."""

from typing import TYPE_CHECKING, Any

from randlora_pl.utils.version import __version__

if TYPE_CHECKING:
    from randlora_pl.engine.api import fit

__all__ = ["__version__", "fit"]


def __getattr__(name: str) -> Any:
    if name == "fit":  # imports PyTorch, which most commands do without
        from randlora_pl.engine.api import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
