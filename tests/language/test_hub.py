"""Whatever libraries raise while something is looked for becomes one line."""

from pathlib import Path

import pytest
import torch

from randlora_pl.errors import UserError
from randlora_pl.language.hub import reached
from randlora_pl.language.models import load_causal
from randlora_pl.language.tokenizers import byte_tokenizer, load_tokenizer

from .small import SHAPES


@pytest.mark.parametrize("text", ["{}", "hello", ""])
def test_a_broken_tokenizer_file_is_told(text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be had \(--model\.tokenizer\): .+line 1"):
        load_tokenizer(str(file))


def test_broken_weights_are_told(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = load_causal("qwen2", "random", tokenizer, overrides=SHAPES["qwen2"] | {"vocab_size": 258})
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "model.safetensors").write_bytes(b"no weights" * 9)
    with pytest.raises(UserError, match=r"cannot be had \(--model\.pretrained\): .*deserializing header"):
        load_causal("qwen2", str(tmp_path), tokenizer)


def test_a_line_that_announces_others_brings_them_along() -> None:
    with pytest.raises(UserError, match=r"wrong field: TypeError: expected int, got str\. Give"), reached("m", "--o"):
        raise TypeError("wrong field:\n    TypeError: expected int,\n got str.")


@pytest.mark.parametrize(
    "error", [UserError("mine"), MemoryError(), torch.OutOfMemoryError("CUDA"), KeyboardInterrupt()]
)
def test_what_has_its_own_message_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as found, reached("m", "--o"):
        raise error
    assert found.value is error
