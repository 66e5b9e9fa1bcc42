from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import LoRA, read_adapter
from randlora_pl.adapters.save_load import copy_adapter
from randlora_pl.tasks import load_task
from tests.support.cli import Run
from tests.tasks.small import images


def test_lora_that_predicts_the_same(run: Run, finished: Path, tmp_path: Path) -> None:
    adapter, output = str(finished / "adapter"), "lora.safetensors"
    result = run("adapter", "export", adapter, "--to", "lora", "--error", "1e-6", "--output", output)
    assert result.code == 0, result.err
    file = read_adapter(tmp_path / output)
    count = sum(tensor.numel() for tensor in file.tensors.values())
    assert isinstance(file.adapter, LoRA) and f"{output}: LoRA, {count:,} parameters, " in result.out
    assert "largest difference of outputs on random images" in result.out
    with torch.no_grad():
        found, expected = (load_task(path).class_logits(images(3)) for path in (tmp_path / output, adapter))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_one_bfloat16_file_and_a_rank(run: Run, finished: Path, tmp_path: Path) -> None:
    copy_adapter(finished / "adapter", tmp_path / "half.safetensors", torch.bfloat16)
    result = run("adapter", "export", "half.safetensors", "--to", "lora", "--rank", "4", "--output", "lora")
    assert result.code == 0 and "error: " in result.out
    assert read_adapter(tmp_path / "lora").adapter.rank == 4
    assert run("test", "--adapter", "lora", "--config", "quickstart", "--trainer.limit_test_batches", "1").code == 0


def test_bad_input(refused: Callable[..., str], finished: Path, tmp_path: Path) -> None:
    base = ("adapter", "export", str(finished / "adapter"), "--to", "lora", "--output")
    assert "--error" in refused(*base, "lora")
    assert "--rank" in refused(*base, "lora", "--rank", "0")
    assert "--error" in refused(*base, "lora", "--error", "2")
    copy_adapter(finished / "adapter", tmp_path / "one")
    again = ("adapter", "export", "one", "--to", "lora", "--rank", "2", "--output", "one", "--overwrite")
    assert "would replace" in refused(*again)
