"""Frozen weights that torchao packs: what is refused without it, and runs with it."""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from randlora_pl.adapters import SVFT, GaLore, LoRAXS, RandLoRA, inject, load_adapter
from randlora_pl.language import CausalLMTask, load_language_task
from randlora_pl.models import load_clip
from randlora_pl.tasks import LinearHeadTask, load_task, load_tasks
from randlora_pl.tasks.quantize import build_quantized
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.packed import stored_bytes, unpacks_itself
from tests.adapters.cases import assert_close, randomise
from tests.docs.pages import PAGES
from tests.support.cli import SMALL, Run

CPU = torch.device("cpu")


def test_a_missing_package_and_methods_of_whole_weights_are_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of this name cannot be loaded."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--model.quantize int8 needs torchao: .*pip install 'randlora-pl\[torchao\]'"):
        LinearHeadTask("none", quantize="int8")
    for adapter in (GaLore(), SVFT()):
        with pytest.raises(UserError, match=rf"int8: {adapter.method()} needs room .*Choose RandLoRA"):
            LinearHeadTask("none", adapter=adapter, quantize="int8")
    layer = nn.Linear(4, 4)
    assert build_quantized(lambda: layer, "4bit", CPU, "float32") == (layer, [])  # of bitsandbytes, by transformers


@pytest.mark.torchao
def test_linear_layers_of_blocks_are_quantized() -> None:
    """Packed attention and its output projections stay in CLIP, as do embeddings and what is shared."""
    clip = load_clip("tiny", "random").model
    before = {name: parameter.clone() for name, parameter in clip.named_parameters()}
    sizes = {name: stored_bytes(parameter) for name, parameter in clip.named_parameters()}
    _, (note,) = build_quantized(lambda: clip, "int8", CPU, "float32")
    packed = [name for name, parameter in clip.named_parameters() if unpacks_itself(parameter)]
    assert packed and all(re.search(r"resblocks\.\d+\.mlp\.(c_fc|c_proj)\.weight$", name) for name in packed)
    for name, parameter in clip.named_parameters():
        if name in packed:
            assert stored_bytes(parameter) < 0.27 * sizes[name]
            assert_close(parameter.dequantize(), before[name], 0.02)
        else:
            assert torch.equal(parameter, before[name])
    assert f"int8 (torchao): {len(packed)} of {2 * len(packed)} weights of the blocks" in note
    assert "attn.in_proj_weight" in note
    with pytest.raises(UserError, match="no linear layer in the blocks of Sequential"):
        build_quantized(lambda: nn.Sequential(nn.Conv2d(3, 4, 3)), "int8", CPU, "float32")
    one, _ = build_quantized(lambda: nn.Sequential(nn.Linear(20, 4)), "int8", CPU, "bfloat16")
    layer: Any = one.get_submodule("0")
    assert layer.weight.dtype == torch.bfloat16 and layer.bias.dtype == torch.float32  # which BitFit trains


@pytest.mark.torchao
def test_four_bits_are_refused_with_the_reasons_of_the_library() -> None:
    def build() -> nn.Module:
        raise AssertionError("the model is loaded")

    with pytest.raises(UserError, match=r"int4: torchao cannot run 256 x 256 on cpu in float32 \(.+\). Use int8"):
        build_quantized(build, "int4", CPU, "float32")


@pytest.mark.torchao
@pytest.mark.parametrize("adapter", [RandLoRA(rank=4), LoRAXS(rank=4)], ids=["randlora", "loraxs"])
def test_a_task_trains_is_saved_and_loaded_on_both_bases(
    adapter: Any, fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"adapter": adapter, "quantize": "int8"}
    task = LinearHeadTask("tiny", "random", **how, gradient_checkpointing=True, learning_rate=1e-2)
    fit(task)
    assert any("int8 (torchao)" in note for note in task.report.notes)
    images = torch.randn(4, 3, 32, 32)
    task.eval()
    with torch.no_grad():
        expected = task.class_logits(images)
        task.save(tmp_path / "adapter")
        loaded, plain = load_task(tmp_path / "adapter", quantize="int8"), load_task(tmp_path / "adapter")
        assert loaded.report.base_hash == plain.report.base_hash == task.report.base_hash != ""
        assert_close(loaded.class_logits(images), expected, 1e-5)
        difference = (plain.class_logits(images) - expected).norm() / expected.norm()
        assert 0 < difference < 0.1 and not any(map(unpacks_itself, plain.parameters()))
        (together,) = load_tasks({"one": tmp_path / "adapter"}, quantize="int8").values()
        assert_close(together.class_logits(images), expected, 1e-5)
        assert any(map(unpacks_itself, together.parameters()))
    other = LinearHeadTask("tiny", "random", seed=1)
    other.set_classes(task.classnames, task.templates)
    model, _ = build_quantized(other.build, "int8", CPU, "float32")
    with pytest.raises(UserError, match="trained on different weights"):
        load_adapter(model, tmp_path / "adapter")


@pytest.mark.torchao
def test_a_decoder_writes_and_compiles(tmp_path: Path) -> None:
    from tests.language.small import make

    task = make("bytes", quantize="int8")
    task.adapt()
    randomise(task.model)
    task.eval()
    task.save(tmp_path / "adapter")
    packed = [name for name, parameter in task.model.named_parameters() if unpacks_itself(parameter)]
    assert len(packed) == 2 * 7 and all("layers." in name for name in packed)  # not the head, which is tied
    loaded = load_language_task(tmp_path / "adapter")
    assert isinstance(loaded, CausalLMTask) and loaded.write(["a"]) == task.write(["a"])
    block: Any = task.model.get_submodule("model.layers.0.mlp")
    x = torch.randn(2, 3, 64, requires_grad=True)
    expected, output = block(x), torch.compile(block, backend="aot_eager")(x)
    assert_close(output, expected, 1e-5)
    gradients = [torch.autograd.grad(each.sum(), x)[0] for each in (output, expected)]
    assert_close(*gradients, 1e-5)


@pytest.mark.torchao
def test_the_blocks_of_the_page(run: Run) -> None:
    page = PAGES["docs/choose.md"].partition("### Frozen weights in eight bits")[2]
    (command,) = re.findall(r"```sh\nrandlora-pl (.*?)\n```", page)
    done = run(*command.split(), *SMALL[2:])
    assert done.code == 0 and "int8 (torchao): " in done.out, done.err
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(code, "choose.md", "exec"), names)
    assert names["report"].rows and inject is names["inject"]
