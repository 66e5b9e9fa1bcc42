from tests.cli.conftest import _coarse_figures, _shallow

__all__ = ["_coarse_figures", "_shallow"]
