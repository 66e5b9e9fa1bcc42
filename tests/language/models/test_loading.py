"""Options of base models on a GPU, without one: quantized weights, and Liger's kernels."""

import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from randlora_pl.language.tasks import causal_lm
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.tasks import make_trainer
from randlora_pl.utils.errors import UserError
from tests.language.small import make

LAYER = "model.layers.0.mlp.up_proj"


def test_quantized_weights_are_multiplied_in_the_precision_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights of norms and embeddings do not make the products of a bf16-mixed training float32."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **how: asked.update(how))
    monkeypatch.setattr(CausalLMTask, "check_vocabulary", lambda *args: None)
    monkeypatch.setattr(causal_lm, "model_config", lambda *args: SimpleNamespace(model_type="qwen2"))
    model = (torch.nn.Module(), {"missing_keys": list[str]()})
    monkeypatch.setattr(CausalLMTask, "pretrained_model", lambda *args, **how: model)
    monkeypatch.setattr(CausalLMTask, "vocabulary", None)
    for precision, compute in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32), (None, torch.float32)):
        task = CausalLMTask(quantize="4bit", targets=["fc"])
        if precision:
            task.trainer = make_trainer(accelerator="cpu", precision=precision)
        task.build()
        assert asked.pop("bnb_4bit_compute_dtype") == compute and asked["load_in_4bit"]


def test_liger_is_asked_for_all_but_its_loss_before_the_adapter(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package."""
    task = make(tokenizer, liger=True)
    assert "liger" not in task.constructor()
    found: list[object] = []
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (found or [None])[0] if name == "liger_kernel" else real(name)
    )
    with pytest.raises(UserError, match=r"pip install '.\[liger\]'"):
        task.configure_model()
    found.append(object())
    with pytest.raises(UserError, match="needs a CUDA device, and the model runs on cpu"):
        task.configure_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen: list[Any] = []
    patches: Any = types.ModuleType("liger_kernel.transformers")
    patches.monkey_patch = types.SimpleNamespace(
        MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None},
        _apply_liger_kernel_to_instance=lambda model, **how: seen.append((type(model.get_submodule(LAYER)), how)),
    )
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", patches)
    with pytest.raises(UserError, match="no kernels for qwen2"):
        task.configure_model()
    task = make(tokenizer, "llama", liger=True)
    task.configure_model()
    ((before, how),) = seen
    assert how == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert before is torch.nn.Linear and type(task.model.get_submodule(LAYER)) is not before
