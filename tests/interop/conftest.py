from collections.abc import Iterator

import pytest
import torch

from tests.tasks.small import two_blocks


@pytest.fixture(autouse=True, scope="package")
def _shallow() -> Iterator[None]:
    """The tiny CLIP has two blocks a tower."""
    with two_blocks():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
