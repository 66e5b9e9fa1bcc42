"""Small tasks and data for the tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch

from randlora_pl.data import ImageData


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer() -> Callable[..., L.Trainer]:
    """A quiet CPU trainer; keyword arguments win."""

    def make(**options: Any) -> L.Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "use_distributed_sampler": False, "num_sanity_val_steps": 0, "enable_progress_bar": False,
            "enable_model_summary": False, "limit_val_batches": 0,
        }  # fmt: skip
        return L.Trainer(**(defaults | options))

    return make


@pytest.fixture
def digits() -> Callable[..., ImageData]:
    """The embedded digits, few-shot; keyword arguments win."""

    def make(**options: Any) -> ImageData:
        return ImageData(**({"dataset": "digits", "shots": 4, "steps": 3, "batch_size": 16} | options))

    return make
