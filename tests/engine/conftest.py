from tests.cli.conftest import _coarse_figures

__all__ = ["_coarse_figures"]
