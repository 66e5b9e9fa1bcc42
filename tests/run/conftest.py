from tests.commands.conftest import _coarse_figures, _shallow

__all__ = ["_coarse_figures", "_shallow"]
