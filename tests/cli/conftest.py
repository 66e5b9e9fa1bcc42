from collections.abc import Iterator

import pytest


@pytest.fixture(scope="package", autouse=True)
def _coarse_figures() -> Iterator[None]:
    """Figures at 100 dots to the inch are a quarter of the time of a tiny run."""
    import matplotlib

    with matplotlib.rc_context({"figure.dpi": 20}):
        yield
