from tests.commands.conftest import _coarse_figures, _shallow, deep

__all__ = ["_coarse_figures", "_shallow", "deep"]
