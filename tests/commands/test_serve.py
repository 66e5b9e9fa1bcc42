"""What is said before a server starts; the server itself is tested in tests/serving."""

import importlib.util
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.commands.serve import describe, start_page
from randlora_pl.serving import ServerOptions
from randlora_pl.utils.errors import UserError
from tests.support.cli import Refused
from tests.support.products import in_one_item


@in_one_item(
    ("words", "message"),
    [
        (("--port", "80"), "--port is 80: give a whole number from 1,024 to 65,535"),
        (("--host", "localhost"), "invalid choice: 'localhost' (choose from"),
        (("--batch-timeout", "-1"), "--batch-timeout is -1.0: give a number from 0 to 10"),
        (("--max-upload-mb", "0"), "--max-upload-mb is 0"),
        (("--device", "tpu"), "--device tpu is not on this machine"),
        (("--precision", "tf32", "--device", "cpu"), "and this is the device cpu. Use --precision bf16 or 32"),
        (("--prot", "8000"), "Did you mean '--port'"),
    ],
)
def test_bad_options(refused: Refused, finished: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refused("serve", "--adapter", str(finished / "adapter"), *words)


def test_bad_adapters(refused: Refused, finished: Path, tmp_path: Path) -> None:
    assert "give either --adapter ADAPTER, or a folder with several" in refused("serve", "--port", "8000")
    assert "give either" in refused("serve", "--adapter", str(finished / "adapter"), "--adapters", ".")
    assert "script is not a folder" in refused("serve", "--adapters", "script")
    (tmp_path / "none").mkdir()
    assert "NAME.safetensors; links are not followed). Copy adapters into it: cp -r" in refused(
        "serve", "--adapters", str(tmp_path / "none")
    )
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
    shutil.move("cut", "none/cut")
    assert "can be served (none/cut/adapter.safetensors cannot be read" in refused("serve", "--adapters", "none")


def test_port_in_use(refused: Refused, finished: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        message = refused("serve", "--adapter", str(finished / "adapter"), "--port", str(port))
    assert f"--port {port} is in use on 127.0.0.1" in message


@pytest.mark.parametrize("missing", ["litserve", "python_multipart"])
def test_without_the_extra(refused: Refused, finished: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more))
    message = refused("serve", "--adapter", str(finished / "adapter"))
    assert f"serve needs {missing}: " in message and " pip install 'randlora-pl[serve]'" in message


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
    several = start_page(ServerOptions(adapters=Path("nowhere")), facts)
    assert "  adapters 0: \n" in several and "-F adapter" not in several
    assert '-H "Authorization: Bearer $RANDLORA_PL_TOKEN" -F' in asked and "secret" not in asked


@pytest.mark.parametrize("task", ["CausalLMTask", "TextClassificationTask"])
def test_an_adapter_of_texts_is_refused_with_the_command_that_takes_it(task: str) -> None:
    config = {"method": "LoRA", "metadata": {"task": task, "classnames": ["good", "bad"]}}
    with pytest.raises(UserError, match="predict --adapter PATH --texts"):
        describe(config, upload_bytes=1, pixels=9, device="cpu")
