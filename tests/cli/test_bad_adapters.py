"""Adapter files that no program has written: a line or two, code 2, before anything large is made of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from randlora_pl.adapters import LoRA, NoLA, RandLoRA, container, inject
from randlora_pl.errors import UserError
from randlora_pl.interop import peft_files
from tests.adapters.zoo import mlp

DEEP = '{"a":' + "[" * 100_000


@pytest.fixture
def adapter(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))


def change(adapter: Path, edit: Callable[[Any], object]) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["sha256"]
    edit(config)
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda config: config["options"].update(alpha=10**400), "alpha"),
        (lambda config: config["options"].update(num_bases=10**9), "num_bases"),
        (lambda config: config["options"].update(num_bases=10**18), "num_bases"),
        (lambda config: config["metadata"].update(classnames=["a", "\ud800"]), "classnames"),
        (lambda config: config["metadata"].update(classnames=[str(n) for n in range(100_000)]), "classes"),
    ],
)
def test_nonsense_in_a_description(
    refused: Callable[..., str], adapter: Path, tmp_path: Path, edit: Callable[[Any], object], word: str
) -> None:
    change(adapter, edit)
    assert word in refused("predict", "--adapter", "adapter", "--images", "adapter", "--output", "-")


def test_deeply_nested_descriptions(refused: Callable[..., str], adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(DEEP)
    (adapter / "adapter_model.safetensors").touch()
    for words in (("predict", "--images", "."), ("test",), ("serve",)):
        assert "nested" in refused(words[0], "--adapter", "adapter", *words[1:])
    assert "nested" in refused("adapter", "info", "adapter")
    with pytest.raises(UserError, match="nested"):
        container.read(adapter)
    with pytest.raises(UserError, match="nested"):
        peft_files.read(adapter)


def test_weights_that_overflow_give_no_predictions(refused: Callable[..., str], adapter: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    tensors = {name: torch.full_like(value, 1e38) for name, value in load_file(adapter / container.TENSORS).items()}
    save_file(tensors, adapter / container.TENSORS)
    change(adapter, lambda config: None)
    message = refused("predict", "--adapter", "adapter", "--images", "x.png", "--output", "p.csv")
    assert "not finite" in message and "Leave it out" not in message


def test_adapters_are_not_much_larger_than_their_model() -> None:
    for method in (RandLoRA(rank=4, num_bases=10**9), NoLA(num_bases=10**9), RandLoRA(variant="a", num_bases=10**9)):
        with pytest.raises(UserError, match="num_bases"):
            inject(mlp(), method, ["enter"])
    inject(mlp(), LoRA(rank=2), ["enter"])
