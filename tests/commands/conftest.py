from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from tests.tasks.small import two_blocks


@pytest.fixture(scope="package", autouse=True)
def _coarse_figures() -> Iterator[None]:
    """Figures at 100 dots to the inch are a quarter of the time of a tiny run."""
    import matplotlib

    with matplotlib.rc_context({"figure.dpi": 20}):
        yield


@pytest.fixture
def deep() -> None:
    """Leave the tiny CLIP its blocks: for its bundled weights, and for figures that depend on their number."""


@pytest.fixture(autouse=True)
def _shallow(request: pytest.FixtureRequest) -> Iterator[None]:
    """A run of a tiny CLIP with two blocks takes two thirds of the time."""
    with nullcontext() if "deep" in request.fixturenames else two_blocks():
        yield
