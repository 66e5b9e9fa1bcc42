"""A search (`AutoLoRA`) in tasks: it resumes exactly, and leaves the training beside it as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from randlora_pl.adapters import AutoLoRA, load_adapter, merge, save_adapter
from randlora_pl.tasks import AdaptationModule
from randlora_pl.utils.errors import UserError
from tests.support.products import marked

from .small import built, make, trained
from .test_resume import SaveAt, assert_same_bits

Make = Callable[..., Any]
STEPS = 4
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "unrolled": ("vision-language", {"rank": 3, "order": "unrolled", "every": 2, "dropout": 0.2}, 2),
    "bases": ("text head", {"rank": 24, "select": "bases"}, 1),
}


def run(name: str, trainer: Make, digits: Make, start: Path | None = None, **options: Any) -> Any:
    kind, adapter, accumulate = RUNS[name]
    task = make(kind, adapter=AutoLoRA(**{**adapter, **options.pop("adapter", {})}), learning_rate=1e-2)
    data = digits(steps=STEPS, batch_size=8 // accumulate)
    trainer(accumulate_grad_batches=accumulate, **options).fit(
        AdaptationModule(task), data, ckpt_path=start, weights_only=True
    )
    return task


def state(task: Any) -> dict[str, Tensor]:
    """Copies of what trains, of v, and of its moments."""
    procedure = task.report.procedure
    moments: dict[str, Tensor] = {}
    for number, (vector, own) in enumerate(zip(procedure.vectors, procedure._adam.state.values(), strict=True)):
        moments |= {f"v {number}": vector.clone()} | {f"{name} {number}": value.clone() for name, value in own.items()}
    return trained(task) | moments


@pytest.mark.parametrize(("name",), marked(zip(RUNS), lambda row: row[0] == "unrolled"))
def test_a_resumed_search_ends_with_the_same_bits(name: str, trainer: Make, digits: Make, tmp_path: Path) -> None:
    """Broken off before and after a step of v."""
    saves = [SaveAt(tmp_path / f"{step}.ckpt", step) for step in (1, 2)]
    whole = run(name, trainer, digits, callbacks=saves)
    assert all(vector.any() for vector in whole.report.procedure.vectors)
    for save in saves:
        resumed = run(name, trainer, digits, save.path)
        assert_same_bits(state(resumed), state(whole))
    assert whole.report.procedure.finish()["search/mean"] > 0


def test_the_training_beside_a_search_is_as_without_it(
    trainer: Make, digits: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it remains in gradients, weights, dropout or the text features of a step, in either order."""
    monkeypatch.setattr("randlora_pl.adapters.methods.autolora.RATE", 0.0)
    ends = [
        trained(run("unrolled", trainer, digits, adapter={"order": order, "every": every}))
        for order, every in (("first", 100), ("first", 1), ("unrolled", 1))
    ]
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0], ends[2])


def test_shares_are_in_files_and_merged_weights(tmp_path: Path) -> None:
    task, other = (built("linear head", adapter=AutoLoRA(rank=2, alpha=64)) for _ in range(2))
    with torch.no_grad():
        for update in task.report.procedure.updates:
            update.B.normal_()
            update.v.normal_()
    task.report.procedure.ran = True
    load_adapter(other.model, save_adapter(task.model, tmp_path / "adapter"))
    x = torch.randn(2, 3, 32, 32)
    expected = task.model(x)
    assert torch.equal(other.model(x), expected)
    merge(other.model)
    assert torch.allclose(other.model(x), expected, atol=1e-4)


def test_a_search_needs_a_data_module_that_holds_out_samples(trainer: Make, digits: Make) -> None:
    task = make("vision-language", adapter=AutoLoRA(rank=2))
    data = digits(steps=1)
    task.set_classes([str(number) for number in range(10)], ["{}"])
    data.setup("fit")
    with pytest.raises(UserError, match="holds out training samples, such as ImageData"):
        trainer().fit(AdaptationModule(task), data.train_dataloader())
