"""Each learner beats its own start within seconds, and changes no weight of the model."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch

from randlora_pl.data import ImageData
from randlora_pl.prompts import CoCoOp, CoOp, DeepPrompts, MaPLe
from randlora_pl.tasks import AdaptationModule, DePT, PromptTask, SelfRegulation
from randlora_pl.utils.reuse import caching
from tests.support.products import marked

TWO, MAPLE = DeepPrompts(length=2, vision_length=2, depth=3), MaPLe(depth=3)


@pytest.fixture(scope="module", autouse=True)
def _models_and_data_are_read_once() -> Iterator[None]:
    with caching():
        yield


@pytest.mark.parametrize(
    ("options", "rate", "size"),
    marked([
        ({"prompts": CoOp()}, 5e-3, 20),
        ({"prompts": CoCoOp()}, 5e-3, 5),  # ten texts for each image
        ({"prompts": TWO}, 5e-3, 20),
        ({"prompts": TWO, "regulation": SelfRegulation(text=5.0, image=2.0, templates=3)}, 5e-3, 20),
        ({"prompts": MAPLE}, 2e-3, 20),
        ({"prompts": MAPLE, "head": DePT()}, 2e-3, 20),
    ], lambda row: row[0] not in ({"prompts": TWO}, {"prompts": MAPLE})),
)  # fmt: skip
def test_a_learner_beats_its_own_start(options: dict[str, Any], rate: float, size: int) -> None:
    task = PromptTask("tiny", **options, prompt_learning_rate=rate)
    data = ImageData(dataset="digits", shots=8, steps=10, batch_size=size, eval_batch_size=40, cache_images=False)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, use_distributed_sampler=False,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        limit_test_batches=1,
    )  # fmt: skip
    (before,) = trainer.test(AdaptationModule(task), data, verbose=False)
    start = {name: value.detach().clone() for name, value in task.named_parameters()}
    trainer.fit(AdaptationModule(task), data)
    (after,) = trainer.test(AdaptationModule(task), data, verbose=False)
    assert after["test/loss"] < before["test/loss"] - 0.3 and after["test/acc"] >= before["test/acc"]
    for name, value in task.named_parameters():
        assert torch.equal(value, start[name]) == (not name.startswith(("learned.", "decoupled."))), name
