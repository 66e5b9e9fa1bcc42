"""Options of quantized base models, without a GPU."""

from typing import Any

import pytest
import torch

from randlora_pl.language.models import loading
from randlora_pl.language.tasks import causal_lm
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.tasks import make_trainer


def test_quantized_weights_are_multiplied_in_the_precision_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights of norms and embeddings do not make the products of a bf16-mixed training float32."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **how: asked.update(how))

    def load(*args: Any, quantize: Any, dtype: torch.dtype, compute: torch.dtype | None, **kwargs: Any) -> Any:
        loading._quantization(quantize, compute or dtype)
        return torch.nn.Module()

    monkeypatch.setattr(causal_lm, "load_causal", load)
    monkeypatch.setattr(CausalLMTask, "vocabulary", None)
    for precision, compute in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32), (None, torch.float32)):
        task = CausalLMTask(quantize="4bit", targets=["fc"])
        if precision:
            task.trainer = make_trainer(accelerator="cpu", precision=precision)
        task.build()
        assert asked.pop("bnb_4bit_compute_dtype") == compute and asked["load_in_4bit"]
