from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from randlora_pl.adapters import SVFT, AdaLoRA, DoRA, FullFineTuning, LoRA, PiSSA, RandLoRA, SHiRA, Together
from randlora_pl.prompts import MaPLe
from randlora_pl.run.callbacks import StartSummary
from randlora_pl.run.callbacks.checkpoint import ValidationSchedule
from randlora_pl.run.callbacks.summary import (
    buffer_bytes,
    describe,
    layer_table,
    other_decay,
    state_size,
    validation_row,
)
from randlora_pl.tasks import TextHeadTask
from randlora_pl.utils.errors import DryRunEnd
from tests.run.callbacks.conftest import Fit
from tests.tasks.small import built


def test_page_says_what_is_trained(fit: Fit, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, task, _ = fit(StartSummary(), accumulate_grad_batches=2)
    out = capsys.readouterr().out
    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    for text in (
        *("RandLoRA rank 16", f"{trainable:,} of", "16 = 8 images x 2 micro-batches", "4 optimizer steps"),
        *("10 classes, 20 train", "2 shots", "32-true on cpu", "0.01", str(tmp_path), "TextHeadTask"),
    ):
        assert text in out
    assert len(out.splitlines()) < 40


def test_page_says_why_an_epoch_has_several_passes(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DryRunEnd):
        fit(StartSummary(dry=True), data={"steps": None, "epochs": 1})
    drawn = "13 optimizer steps, 100 images drawn (5 passes: an epoch has at least 10 batches)"
    assert drawn in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("limit", "wanted"), [(1.0, 143), (0.7, 128), (1, 64), (2, 128), (3, 143)])
def test_a_validation_reads_what_its_limit_leaves(limit: float, wanted: int) -> None:
    callbacks, plan = [ValidationSchedule()], SimpleNamespace(num_samples=8, global_batch=8, steps=9)
    data = SimpleNamespace(held_out=143, eval_batch_size=32, unit="images", plan=plan)
    trainer: Any = SimpleNamespace(
        limit_val_batches=limit, world_size=2, check_val_every_n_epoch=1, callbacks=callbacks, datamodule=data,
        max_steps=9,
    )  # fmt: skip
    task: Any = TextHeadTask("tiny", "random")
    size = f"{wanted} of 143" if wanted < 143 else "143"
    assert validation_row(trainer, task, data) == {"validation": f"1 time on {size} images"}


def test_page_says_how_many_images_are_validated_and_if_they_are_too_few(
    fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(StartSummary(), limit_val_batches=1, data={"eval_batch_size": 16})
    out = " ".join(capsys.readouterr().out.split())
    few = "too few to choose by: accuracies have a standard error of up to 12 points"
    assert f"validation 1 time on 16 of 143 images, {few}" in out


def test_layers_of_one_kind_share_a_row_and_long_tables_are_cut_with_a_total() -> None:
    for method in ("lora", "full"):
        report = built("vision-language", method).report
        lines = layer_table(report).splitlines()
        assert len(lines) == 1 + 6 if method == "lora" else "more" in lines[-1]  # three kinds of layer in two towers
        assert sum(int(line.split()[-1].replace(",", "")) for line in lines[1:]) == report.trainable


def test_adapters_are_described_by_what_is_unusual() -> None:
    assert describe(RandLoRA()) == "RandLoRA rank 6"
    assert describe(MaPLe(depth=4)) == "MaPLe depth 4"  # the rank is of another coupling
    assert describe(RandLoRA(rank=8, alpha=1, seed=3)) == "RandLoRA rank 8, alpha 1"
    assert describe(DoRA(LoRA(rank=4))) == "DoRA of LoRA rank 4"
    both = Together([LoRA(rank=4), RandLoRA()], rates=[10.0, 0.5])
    assert describe(both) == "Together of LoRA rank 4, RandLoRA rank 6; rates 10, 0.5"
    assert describe(Together([LoRA(rank=4), DoRA(LoRA(rank=2))])) == "Together of LoRA rank 4, DoRA of LoRA rank 2"
    assert describe(FullFineTuning()) == "FullFineTuning"


def test_a_decay_that_is_not_applied_is_shown() -> None:
    text, linear = (built(kind, adapter=PiSSA(rank=2), weight_decay=0.1) for kind in ("text head", "linear head"))
    dora = built("text head", adapter=DoRA(LoRA(rank=2)), weight_decay=0.1)
    magnitudes = sum(row.shape[0] for row in dora.report.rows)
    assert other_decay(text)["weight decay"] == "0 instead of 0.1, which would change the base model"
    assert other_decay(dora)["weight decay"].startswith(f"0.1; 0 for {magnitudes:,} numbers, whose decay would")
    assert other_decay(linear)["weight decay"].endswith("; head 0.1")
    assert other_decay(built("text head", adapter=LoRA(rank=2))) == {}


def test_buffers_and_averages_count_for_memory_and_checkpoints() -> None:
    shapes = [row.shape for row in built("linear head", adapter=LoRA(rank=2)).report.rows]
    singular = sum(min(shape) * sum(shape) for shape in shapes)
    assert buffer_bytes(built("linear head", adapter=SVFT(pattern="plain"))) == 4 * singular
    assert buffer_bytes(built("linear head", adapter=PiSSA(rank=2))) == 4 * sum(2 * sum(shape) for shape in shapes)
    sparse = built("linear head", adapter=SHiRA(rank=2))
    assert buffer_bytes(sparse) == buffer_bytes(sparse, derived=False) == 4 * sparse.report.trainable
    assert buffer_bytes(built("linear head", adapter=LoRA(rank=2))) == 0
    lora, pruned = (built("text head", adapter=adapter) for adapter in (LoRA(rank=2), AdaLoRA(rank=2)))
    assert state_size(lora) == 2 * lora.report.trainable
    pruned.report.procedure.start(pruned.model)
    averages = pruned.report.procedure.state_dict()
    assert sum(each.numel() for name in ("mean", "deviation") for each in averages[name]) == 2 * pruned.report.trainable
    assert state_size(pruned) == 4 * pruned.report.trainable
