"""Whatever libraries raise while something is looked for becomes one line."""

import logging
import socket
from pathlib import Path

import pytest
import torch

from randlora_pl.language.loading import reached
from randlora_pl.language.tasks.causal_lm import CausalLMTask
from randlora_pl.language.tokenization import load_tokenizer
from randlora_pl.utils.errors import UserError
from tests.fake_hub import ask
from tests.language.small import SHAPES

GATED = "meta-llama/Meta-Llama-3-8B"


@pytest.mark.parametrize("text", ["{}", "hello", ""])
def test_a_broken_tokenizer_file_is_told(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"\(--model\.tokenizer\)"):
        load_tokenizer(str(file))


def test_broken_weights_are_told(tmp_path: Path) -> None:
    model = CausalLMTask("qwen2", "random", config_overrides=SHAPES["qwen2"] | {"vocab_size": 258}).build()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "model.safetensors").write_bytes(b"no weights" * 9)
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
