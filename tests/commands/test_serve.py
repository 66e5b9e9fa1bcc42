"""What is said before a server starts; the server itself is tested in tests/serving."""

import importlib.util
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.commands.serve import describe, start_page
from randlora_pl.serving import ServerOptions
from randlora_pl.utils.errors import UserError
from tests.support.cli import Run
from tests.support.products import in_one_item


def test_help(run: Run) -> None:
    bare, asked = run("serve"), run("serve", "--help")
    assert (bare.code, asked.code) == (2, 0) and not bare.out
    for page in (bare.err, asked.out):
        assert "--max-upload-mb" in page and "--samples DIR" in page and "curl -F image=@photo.jpg" in page
        assert all(len(line) <= 120 for line in page.splitlines())


@in_one_item(
    ("words", "message"),
    [
        (("--port", "80"), "--port is 80: give a whole number from 1,024 to 65,535"),
        (("--port", "x"), "invalid int value"),
        (("--host", "localhost"), "invalid choice: 'localhost' (choose from"),
        (("--workers", "0"), "--workers is 0: give a positive whole number"),
        (("--batch-size", "0"), "--batch-size is 0"),
        (("--batch-timeout", "-1"), "--batch-timeout is -1.0: give a number from 0 to 10"),
        (("--batch-timeout", "nan"), "--batch-timeout is nan"),
        (("--max-upload-mb", "0"), "--max-upload-mb is 0"),
        (("--max-pixels", "-5"), "--max-pixels is -5"),
        (("--device", "tpu"), "--device tpu is not on this machine"),
        (("--precision", "tf32", "--device", "cpu"), "and this is the device cpu. Use --precision bf16 or 32"),
        (("--precision", "16"), "invalid choice: '16'"),
        (("--prot", "8000"), "Did you mean '--port'"),
    ],
)
def test_bad_options(refused: Callable[..., str], finished: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refused("serve", "--adapter", str(finished / "adapter"), *words)


def test_bad_adapters(refused: Callable[..., str], finished: Path, tmp_path: Path) -> None:
    assert "required: --adapter" in refused("serve", "--port", "8000")
    assert "nowhere" in refused("serve", "--adapter", "nowhere")
    assert "RUN/adapter" in refused("serve", "--adapter", str(finished / "checkpoints"))
    plain = tmp_path / "plain"
    shutil.copytree(finished / "adapter", plain)
    config = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps(config | {"metadata": {}}))
    assert "task" in refused("serve", "--adapter", str(plain))
    del config["metadata"]["classnames"], config["sha256"]
    (plain / "adapter_config.json").write_text(json.dumps(config))
    assert "metadata.classnames" in refused("serve", "--adapter", str(plain))
    shutil.copytree(finished / "adapter", tmp_path / "cut")
    tensors = tmp_path / "cut" / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:500])
    assert "truncated" in refused("serve", "--adapter", "cut")


def test_port_in_use(refused: Callable[..., str], finished: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = refused("serve", "--adapter", str(finished / "adapter"), "--port", str(port))
    assert f"--port {port} is in use on 127.0.0.1" in message


@pytest.mark.parametrize("missing", ["litserve", "python_multipart"])
def test_without_the_extra(
    refused: Callable[..., str], finished: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    message = refused("serve", "--adapter", str(finished / "adapter"))
    assert f"serve needs {missing}: pip install '.[serve]'" in message


def test_a_public_address_is_told_with_a_caution() -> None:
    options = ServerOptions(adapter=Path("a"), host="0.0.0.0", workers=2, max_upload_mb=2.5)
    config = {
        "method": "LoRA",
        "base_model": {"library": "timm", "name": "vit", "pretrained": "/home/someone/weights.pt"},
        "metadata": {"task": "LinearHeadTask", "classnames": ["cat", "dog"]},
    }
    facts = describe(config, upload_bytes=2_500_000, pixels=9, device="cpu")
    assert "/home" not in json.dumps(facts) and facts["base_model"]["pretrained"] == "weights.pt"
    page = start_page(options, facts)
    assert "timm vit (weights.pt) with LoRA, 2 workers on cpu" in page and "2: cat, dog\n" in page
    assert "http://127.0.0.1:8000/" in page and "limits   2.5 MB" in page
    assert "caution  every machine that can reach this one can use it" in page
    assert "caution" not in start_page(ServerOptions(adapter=Path("a")), facts)
    asked = start_page(ServerOptions(adapter=Path("a"), token="secret"), facts)
    assert '-H "Authorization: Bearer $RANDLORA_PL_TOKEN" -F' in asked and "secret" not in asked


@pytest.mark.parametrize("task", ["CausalLMTask", "TextClassificationTask"])
def test_an_adapter_of_texts_is_refused_with_the_command_that_takes_it(task: str) -> None:
    config = {"method": "LoRA", "metadata": {"task": task, "classnames": ["good", "bad"]}}
    with pytest.raises(UserError, match="predict --adapter PATH --texts"):
        describe(config, upload_bytes=1, pixels=9, device="cpu")
