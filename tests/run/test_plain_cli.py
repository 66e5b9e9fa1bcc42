"""A user's own LightningCLI, whose module has an adapter as an option, without anything of `randlora_pl.run`."""

import subprocess
import sys

import pytest
from jsonargparse import ArgumentParser

from randlora_pl.adapters import Adapter, DoRA, LoRA, RandLoRA, Together

CODE = """
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from randlora_pl.adapters import Adapter, LoRA

class Mine(LightningModule):
    def __init__(self, adapter: Adapter{default}):
        super().__init__()
        self.adapter = adapter

cli = LightningCLI(Mine, run=False, save_config_callback=None, args={words!r})
print(cli.model.adapter)
"""


class Module:
    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter


class Defaulting:
    def __init__(self, adapter: Adapter = LoRA(rank=3)) -> None:  # noqa: B008 (frozen)
        self.adapter = adapter


def parsed(kind: type, *words: str) -> Adapter:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    adapter: Adapter = parser.instantiate(parser.parse_args([*words])).model.adapter
    return adapter


def test_an_option_is_an_adapter_by_its_class_name() -> None:
    adapter = parsed(Module, "--model.adapter", "RandLoRA", "--model.adapter.rank", "4")
    assert isinstance(adapter, RandLoRA) and adapter.options() == RandLoRA(rank=4).options()
    inner = ["--model.adapter", "DoRA", "--model.adapter.inner", "RandLoRA", "--model.adapter.inner.rank", "4"]
    assert parsed(Module, *inner).options() == DoRA(RandLoRA(rank=4)).options()
    parts = "[{class_path: LoRA, init_args: {rank: 2}}, {class_path: RandLoRA}]"
    together = parsed(Module, "--model.adapter", "Together", "--model.adapter.parts", parts)
    assert together.options() == Together([LoRA(rank=2), RandLoRA()]).options()


def test_a_default_can_be_changed() -> None:
    assert parsed(Defaulting).options() == LoRA(rank=3).options()
    assert parsed(Defaulting, "--model.adapter.alpha", "4").options() == LoRA(rank=3, alpha=4.0).options()
    assert isinstance(parsed(Defaulting, "--model.adapter", "RandLoRA"), RandLoRA)


@pytest.mark.slow
@pytest.mark.parametrize(("default", "words"), [("", ["--model.adapter", "RandLoRA"]), (" = LoRA()", [])])
def test_lightnings_own_command_line(default: str, words: list[str]) -> None:
    code = CODE.format(default=default, words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RandLoRA(rank=6, alpha=10.0" if words else "LoRA(rank=32, alpha=1.0")
