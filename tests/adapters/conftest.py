"""A fixed global seed for the adapter tests: tiny tensors, repeatable runs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
