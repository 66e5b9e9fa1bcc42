"""HydraLoRA's update depends on the input: a run, every command that needs a matrix, and every one that does not."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from randlora_pl.adapters import (
    AdapterSet,
    HydraLoRA,
    LoRA,
    RandLoRA,
    adapted_layers,
    delta_weights,
    inject,
    merge,
    merge_and_unload,
    save_adapter,
)
from randlora_pl.adapters.layers import WeightedSum
from randlora_pl.commands.main import main
from randlora_pl.tasks import load_task
from randlora_pl.utils.errors import UserError
from tests.adapters.cases import One, TimmAttention, assert_close, randomise
from tests.support.cli import SMALL, Refused, Run
from tests.support.products import in_one_item

REASON = "the update depends on the input and no weight contains it"
REMEDY = "predict, serve and, for images, adapter export --to torch run it unmerged"


def test_no_operation_makes_a_matrix_of_the_update() -> None:
    model = One(12, 20)
    inject(model, HydraLoRA(rank=3), ["fc"])
    randomise(model)
    layer: Any = adapted_layers(model)["fc"]
    weight, x = torch.randn(20, 12), torch.ones(12)
    before = model(x)
    operations: list[Callable[[], object]] = [
        lambda: layer.delta.effective_weight(weight),
        lambda: layer.delta.change(weight),
        lambda: WeightedSum([layer.delta], [0.5]).change(weight),
        layer.merge,
        lambda: delta_weights(model),
        lambda: merge(model),
        lambda: merge_and_unload(model),
    ]
    for operation in operations:
        with pytest.raises(UserError, match=f"{REASON}, so .* is not possible.*{REMEDY}"):
            operation()
    with pytest.raises(UserError, match=r"^fc: the update depends"):
        merge(model)
    merge(model, strict=False)
    assert torch.equal(model(x), before) and not layer.merged


@in_one_item("qkv", ["packed", "split"])
def test_sets_and_sums_add_outputs(qkv: Any, tmp_path: Path) -> None:
    """A merged set stays merged where it can: HydraLoRA is applied as it is, the others are merged again."""
    base, x = TimmAttention(12), torch.randn(2, 5, 12)
    outputs: dict[str, Tensor] = {}
    for name, adapter in (
        ("hydra", HydraLoRA(rank=3, qkv=qkv)),
        ("lora", LoRA(rank=3, qkv=qkv)),
        ("rand", RandLoRA(rank=3)),
    ):
        model = TimmAttention(12)
        model.load_state_dict(base.state_dict())
        inject(model, adapter, ["qkv", "o"] if name == "lora" else ["qkv"])
        randomise(model)
        save_adapter(model, tmp_path / name)
        outputs[name] = model(x)
    adapters = AdapterSet(base)
    for name in outputs:
        adapters.load(name, tmp_path / name)
    adapters.use("rand")
    merge(base)
    for name in ("hydra", "lora", "hydra", "rand"):
        adapters.use(name)
        assert_close(base(x), outputs[name])
        assert {layer.merged for layer in adapted_layers(base).values()} == {name != "hydra"}
    adapters.use({"hydra": 0.7, "rand": -0.4})
    qkv_layer: Any = base.attn.qkv
    total = qkv_layer(x)
    with adapters.using(None):
        plain = base.attn.qkv(x)
    expected = plain
    for name, weight in (("hydra", 0.7), ("rand", -0.4)):
        with adapters.using(name):
            expected = expected + weight * (base.attn.qkv(x) - plain)
    assert_close(total, expected)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, whose heads differ; to be read only."""
    root = tmp_path_factory.mktemp("hydra")
    words = ["--model.adapter", "HydraLoRA", "--model.adapter.rank", "2", "--model.learning_rate", "0.02"]
    assert main(["fit", *SMALL, *words, "--run.root", str(root)]) == 0
    os.environ.pop("RANDLORA_PL_RUN_FOLDER", None)
    return next((root / "quickstart").glob("2*"))


REFUSED = [
    "adapter merge {run} --output merged.pt",
    "adapter add {run} {run} --as merged --output sum.pt",
    "adapter add {run} {run} --as lora --rank 2 --output sum",
    "adapter export {run} --to lora --rank 2 --output lora",
    "adapter export {run} --to peft --output peft",
    "analyze spectrum {run}",
    "analyze represent {run} --ranks 2",
    "analyze landscape {run} {run} {run}",
]


def test_commands_that_need_a_matrix_are_refused(trained: Path, refused: Refused) -> None:
    for command in REFUSED:
        said = refused(*command.format(run=trained).split())
        assert f"(HydraLoRA): {REASON}" in said and REMEDY in said, command


def test_a_run_its_reports_and_its_programs(trained: Path, run: Run, tmp_path: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    assert results["test/acc"] >= 0 and results["val/acc"] >= 0
    info = run("adapter", "info", str(trained))
    assert info.code == 0 and REASON in info.out
    assert REASON in run("adapter", "diff", str(trained), str(trained)).out
    task = load_task(trained / "adapter")
    expected = task.class_logits(torch.zeros(2, 3, 32, 32))
    done = run("analyze", "forgetting", str(trained), "--datasets", "digits", "--images", "20", "--device", "cpu")
    assert done.code == 0, done.err
    assert expected.isfinite().all() and not any(layer.merged for layer in adapted_layers(task.model).values())


@in_one_item("form", ["torch", "onnx"])
@pytest.mark.slow
def test_programs_have_the_router(form: str, trained: Path, run: Run) -> None:
    """The export compares its outputs with the adapted model's; the text tower works, too."""
    if form == "onnx":
        pytest.importorskip("onnxscript", reason='this needs the extra: pip install ".[onnx]"')
        pytest.importorskip("onnxruntime", reason='this needs the extra: pip install ".[onnx]"')
    suffix = {"torch": "pt2", "onnx": "onnx"}[form]
    for part in ("classifier", "text"):
        done = run("adapter", "export", str(trained), "--to", form, "--part", part, "--output", f"{part}.{suffix}")
        assert done.code == 0, done.err
    if form == "torch":
        program = torch.export.load(Path(f"classifier.{suffix}"))
        assert any(name.endswith("router") for name in program.state_dict)


def test_layers_without_an_input_of_their_own_are_refused() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight / self.weight.norm(), self.bias)

    with pytest.raises(UserError, match=r"Scaled has a forward of its own, so its update cannot depend on the input"):
        inject(nn.Sequential(Scaled(4, 4, 3)), HydraLoRA(rank=2), ["0"])
