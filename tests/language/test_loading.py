"""Base models that are looked for, damaged, quantized or patched: whatever libraries raise becomes one line."""

import importlib.util
import logging
import socket
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from randlora_pl.language.tasks import causal_lm
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tokenization import load_tokenizer, reached
from randlora_pl.tasks.run import Run
from randlora_pl.utils.errors import UserError
from tests.fake_hub import ask
from tests.language.small import SHAPES, make

GATED = "meta-llama/Meta-Llama-3-8B"


@pytest.mark.parametrize("text", ["{}", "hello", ""])
def test_a_broken_tokenizer_file_is_told(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"\(--model\.tokenizer\)"):
        load_tokenizer(str(file))


def test_broken_weights_are_told(tmp_path: Path) -> None:
    model: Any = CausalLMTask("qwen2", "random", config_overrides=SHAPES["qwen2"] | {"vocab_size": 258}).build()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(each for each in tensors if each.endswith("up_proj.weight"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 tensors of Qwen2ForCausalLM, such as {name}"):
        CausalLMTask("qwen2", str(tmp_path), tokenizer="bytes").build()
    file.write_bytes(b"no weights" * 9)
    with pytest.raises(UserError, match=r"\(--model\.pretrained\)"):
        CausalLMTask("qwen2", str(tmp_path), tokenizer="bytes").build()


def test_a_line_that_announces_others_brings_them_along() -> None:
    with pytest.raises(UserError, match="TypeError"), reached("m", "--o"):
        raise TypeError("wrong field:\n    TypeError: expected int,\n got str.")


@pytest.mark.parametrize(
    "error", [UserError("mine"), MemoryError(), torch.OutOfMemoryError("CUDA"), KeyboardInterrupt()]
)
def test_what_has_its_own_message_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, reached("m", "--o"):
        raise error
    assert found.value is error


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """No Hub answers and the cache is empty; the seconds that huggingface_hub would wait between its tries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        ask(monkeypatch, f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    waited: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", waited.append)
    return waited


def test_a_hub_that_does_not_answer_is_one_line_and_one_try(
    waits: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    with pytest.raises(UserError, match=r"\(--model\.name\)") as found:
        load_tokenizer("no/name", option="--model.name")
    assert not waits and not caplog.records
    assert "gated" not in str(found.value) and "\n" not in str(found.value)


def test_other_remarks_of_the_hub_pass(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    library = logging.getLogger("huggingface_hub.utils._http")
    with reached("m", "--o"):
        library.warning("the token expires")
        library.warning("Retrying in 1s [Retry 1/5].")
    library.warning("Retrying in 2s [Retry 2/5].")
    said = [record.getMessage() for record in caplog.records if record.name == library.name]
    assert said == ["the token expires", "Retrying in 2s [Retry 2/5]."]


@pytest.mark.usefixtures("waits")
def test_a_known_gated_model_is_told_without_a_network() -> None:
    with pytest.raises(
        UserError, match=rf"cannot be loaded .*\nIt is gated: .*huggingface.co/{GATED}, .*hf auth login"
    ):
        load_tokenizer(GATED)
    with pytest.raises(UserError, match=r"\nIt"):
        CausalLMTask(GATED, tokenizer="bytes").build()


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
        task.run = Run(precision=precision)
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
    with pytest.raises(UserError, match=r"pip install 'randlora-pl\[liger\]'"):
        task.adapt()
    found.append(object())
    with pytest.raises(UserError, match="needs a CUDA device, and the model runs on cpu"):
        task.adapt()
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
        task.adapt()
    task = make(tokenizer, "llama", liger=True)
    task.adapt()
    ((before, how),) = seen
    assert how == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert before is torch.nn.Linear and type(task.model.get_submodule(LAYER)) is not before
