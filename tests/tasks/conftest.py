"""Quiet trainers and the embedded digits for the tests of this folder."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest

from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule
from randlora_pl.utils.reuse import caching

from .small import two_blocks


@pytest.fixture(autouse=True, scope="package")
def shallow() -> Iterator[None]:
    """A small model, which is drawn once, as its images are read once."""
    with two_blocks(), caching():
        yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Text heads are cached beside the tests, not in the user's folder."""
    monkeypatch.setenv("RANDLORA_PL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


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
        return ImageData(
            **({"dataset": "digits", "shots": 4, "steps": 3, "batch_size": 8, "eval_batch_size": 32} | options)
        )

    return make


@pytest.fixture
def fit(trainer: Callable[..., L.Trainer], digits: Callable[..., ImageData]) -> Callable[..., L.Trainer]:
    """Trains a task on a few digits: ``fit(task, {data options}, **trainer options)``."""

    def run(task: L.LightningModule, data: dict[str, Any] | None = None, **options: Any) -> L.Trainer:
        own = trainer(**options)
        own.fit(AdaptationModule(task), digits(**(data or {})))
        return own

    return run
