from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from randlora_pl.adapters import RandLoRA
from randlora_pl.data import ImageData
from randlora_pl.tasks import AdaptationModule, TextHeadTask, make_trainer
from randlora_pl.utils.reuse import caching
from tests.tasks.small import two_blocks

Fit = Callable[..., tuple[Trainer, TextHeadTask, ImageData]]


@pytest.fixture(scope="package", autouse=True)
def _coarse_figures() -> None:
    """Leave figures their size: these tests look at them."""


@pytest.fixture(autouse=True, scope="package")
def _small_model() -> Iterator[None]:
    with two_blocks(), caching():
        yield


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """Four optimizer steps of a vision-only task on eight digits a step, with some callbacks."""

    def call(
        *callbacks: Callback, task: TextHeadTask | None = None, data: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        chosen = {"shots": 2, "steps": 4, "batch_size": 8, "eval_batch_size": 64} | (data or {})
        images = ImageData(dataset="digits", **chosen)
        task = task or TextHeadTask("tiny", "random", adapter=RandLoRA(rank=16))
        plain = {"accelerator": "cpu", "default_root_dir": tmp_path, "callbacks": [*callbacks], "log_every_n_steps": 1}
        trainer = make_trainer(**(plain | {"limit_val_batches": 0, "limit_test_batches": 2} | options))
        trainer.fit(AdaptationModule(task), images, weights_only=True)
        return trainer, task, images

    return call
