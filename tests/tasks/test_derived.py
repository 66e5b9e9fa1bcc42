"""Methods that derive tensors from the weights: no decay where it harms, and resumed runs with the same bits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from randlora_pl.adapters import SVFT, Adapter, BitFit, DoRA, LoRA, LoRAXS, PiSSA, Together, delta_weights, derived
from randlora_pl.adapters.derived import derived_buffers
from randlora_pl.run.callbacks.checkpoint import CheckpointFile
from randlora_pl.tasks import AdaptationModule, Objective
from randlora_pl.utils.errors import UserError
from tests.support.products import marked

from .small import built, make, trained
from .test_resume import SaveAt, assert_same_bits

Make = Callable[..., Any]
STEPS = 3


def test_decay_is_off_where_it_would_change_the_pretrained_weights() -> None:
    for adapter, decays in (
        (PiSSA(rank=4), [0.0]),
        (PiSSA(rank=4, start="olora"), [0.0]),
        (DoRA(PiSSA(rank=4)), [0.0]),
        (BitFit(), [0.0]),
        (DoRA(LoRA(rank=4)), [0.1, 0.0]),
        (Together([PiSSA(rank=4), LoRA(rank=4)]), [0.1, 0.0]),
        (PiSSA(rank=4, start="minor"), [0.1]),
        (LoRAXS(rank=4), [0.1]),
        (LoRA(rank=4), [0.1]),
    ):
        task = built("text head", adapter=adapter, weight_decay=0.1)
        assert [group["weight_decay"] for group in task.optimizer_groups()] == decays
    task = built("linear head", adapter=PiSSA(rank=4), weight_decay=0.1)
    groups = task.optimizer_groups()
    assert [group["weight_decay"] for group in groups][-1] == 0.1  # the head's
    optimizer = torch.optim.AdamW(groups[:-1], lr=0.1)
    for group in groups[:-1]:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not any(delta.any() for delta in delta_weights(task.model).values())


def _other_lapack(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = derived.factors

    def rounded(recipe: derived.RecipeName, matrix: torch.Tensor, rank: int) -> derived.Triple:
        left, values, right = whole(recipe, matrix, rank)
        return left * (1 + 1e-6), values, -right

    monkeypatch.setattr(derived, "factors", rounded)


def run(trainer: Make, digits: Make, adapter: Adapter, start: Path | None = None, *callbacks: Any) -> Objective:
    task = make("text head", adapter=adapter)
    own: L.Trainer = trainer(callbacks=[*callbacks], plugins=[CheckpointFile()])
    own.fit(AdaptationModule(task), digits(steps=STEPS, batch_size=4), ckpt_path=start, weights_only=True)
    return task


@pytest.mark.parametrize(
    ("adapter",),
    marked(zip([PiSSA(rank=4), LoRAXS(rank=4, keep_derived=True), SVFT()]), lambda row: isinstance(row[0], PiSSA)),
    ids=["PiSSA", "LoRAXS", "SVFT"],
)
def test_a_resumed_run_has_the_same_bits_with_another_lapack(
    adapter: Adapter, trainer: Make, digits: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = [SaveAt(tmp_path / f"{step}.ckpt", step) for step in (1, 2)]
    whole = run(trainer, digits, adapter, None, *saves)
    content = torch.load(tmp_path / "1.ckpt", weights_only=True)
    (beside,) = tmp_path.glob("derived-*.safetensors")  # once for both checkpoints
    assert content["derived"] == beside.name and len(content["state_dict"]) == len(trained(whole))
    with monkeypatch.context() as machine:
        _other_lapack(machine)
        resumed = run(trainer, digits, adapter.replace(keep_derived=False), tmp_path / "1.ckpt")
    assert_same_bits(trained(resumed), trained(whole))
    assert_same_bits(derived_buffers(resumed.model), derived_buffers(whole.model))
    shutil.copy(tmp_path / "1.ckpt", alone := tmp_path / "alone.ckpt")
    beside.write_bytes(beside.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"needs derived-\w+.safetensors next to it"):
        run(trainer, digits, adapter, alone)


def test_lightnings_own_files_contain_the_tensors(trainer: Make, digits: Make, tmp_path: Path) -> None:
    task, path = make("text head", adapter=PiSSA(rank=4)), tmp_path / "one.ckpt"
    own: L.Trainer = trainer()
    own.fit(AdaptationModule(task), digits(steps=1))
    own.save_checkpoint(path)
    assert torch.load(path, weights_only=True)["derived"].keys() == {
        f"objective.{name}" for name, _ in task.named_buffers() if name.endswith((".A0", ".B0"))
    }
    other = make("text head", adapter=PiSSA(rank=4))
    trainer(limit_test_batches=1).test(
        AdaptationModule(other), digits(), ckpt_path=path, weights_only=True, verbose=False
    )
    assert_same_bits(trained(other), trained(task))
