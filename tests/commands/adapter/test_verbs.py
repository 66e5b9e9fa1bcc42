"""``adapter``: its table of verbs, its pages, and our own format written once more."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import LoRA, read_adapter
from randlora_pl.adapters.save_load import copy_adapter
from randlora_pl.tasks import load_task
from tests.support.cli import Refused, Run
from tests.support.products import in_one_item
from tests.tasks.small import images


@in_one_item(
    ("words", "message"),
    [
        (["expot"], "Unknown command adapter expot. Did you mean 'export'"),
        (["export", "A"], "the following arguments are required: --to, --output"),
        (["export", "A", "--to", "onx", "--output", "x"], "--to: invalid choice: 'onx'"),
        (["export", "A", "--to", "peft", "--rank", "3", "--output", "x"], "--rank belongs to --to lora, not to"),
        (["export", "A", "--to", "lora", "--dtype", "float16", "--output", "x"], "--dtype belongs to --to adapter"),
        (["export", "A", "--to", "adapter", "--ranks", "3", "--output", "x"], "unrecognized arguments: --ranks"),
        (["export", "A", "--to", "adapter", "--output", "x"], "adapter folder"),
    ],
)
def test_mistakes(refused: Refused, words: list[str], message: str) -> None:
    assert message in refused("adapter", *words)


@pytest.mark.parametrize("name", ["half", "half.safetensors"])
def test_our_own_format_in_half_precision(run: Run, finished: Path, tmp_path: Path, name: str) -> None:
    words = ("adapter", "export", str(finished / "adapter"), "--to", "adapter", "--dtype", "bfloat16", "--output", name)
    result = run(*words)
    assert result.code == 0 and result.out.startswith(f"{name}: ")
    whole, half = read_adapter(finished / "adapter"), read_adapter(tmp_path / name)
    assert {tensor.dtype for tensor in half.tensors.values()} == {torch.bfloat16}
    assert whole.metadata == half.metadata
    refused = run(*words)
    assert refused.code == 2 and f"{name} exists" in refused.err
    assert run(*words, "--overwrite").code == 0


def test_one_file_is_tested_like_its_folder(run: Run, finished: Path, tmp_path: Path) -> None:
    assert run("adapter", "export", str(finished / "adapter"), "--to", "adapter", "--output", "a.safetensors").code == 0
    shutil.copyfile(finished / "config.yaml", "config.yaml")  # beside the file, as beside the folder of a run
    limit = ("--trainer.limit_test_batches", "1", "--trainer.enable_progress_bar", "false")
    figures = []
    for name, adapter in (("folder", finished / "adapter"), ("file", Path("a.safetensors"))):
        result = run("test", "--adapter", str(adapter), *limit, "--run.root", "runs", "--run.name", name)
        assert result.code == 0, result.err
        (file,) = tmp_path.glob(f"runs/{name}-test/2*/results.json")
        figures.append(json.loads(file.read_text())["test/loss"])
    assert figures[0] == figures[1]
    Path("b.safetensors").write_bytes(b"\xff" * 100)
    refused = run("test", "--adapter", "b.safetensors", *limit)
    assert refused.code == 2 and "b.safetensors" in refused.err and "Traceback" not in refused.err


def test_places_that_cannot_be_written(refused: Refused, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "adapter", tmp_path / "own")
    (tmp_path / "file").write_text("x")
    for output in ("file/copy", "file/copy.safetensors"):
        message = refused("adapter", "export", "own", "--to", "adapter", "--output", output)
        assert f"{output} cannot be written" in message
    for form, output in (("peft", "own/sub"), ("onnx", "own/m.onnx"), ("adapter", "own/copy.safetensors")):
        message = refused("adapter", "export", "own", "--to", form, "--output", output)
        assert f"--output {output} would replace the adapter own" in message
    message = refused("predict", "--adapter", "own", "--images", "file", "--output", "own", "--overwrite")
    assert "own is a folder or a device; give a file" in message


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


def test_words_that_lora_needs(refused: Refused, finished: Path, tmp_path: Path) -> None:
    base = ("adapter", "export", str(finished / "adapter"), "--to", "lora", "--output")
    assert "--error" in refused(*base, "lora")
    assert "--rank" in refused(*base, "lora", "--rank", "0")
    assert "--error" in refused(*base, "lora", "--error", "2")
    copy_adapter(finished / "adapter", tmp_path / "one")
    again = ("adapter", "export", "one", "--to", "lora", "--rank", "2", "--output", "one", "--overwrite")
    assert "would replace" in refused(*again)
