"""Saved configs name classes by public paths."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import randlora_pl
from randlora_pl.utils.class_paths import exported, public_path, with_public_paths
from tests.support.products import in_one_item

ROOMS = ("adapters", "run.callbacks", "data", "language", "tasks")


@pytest.mark.parametrize("room", ROOMS)
def test_every_exported_class_has_the_path_of_its_room(room: str) -> None:
    package = import_module(f"randlora_pl.{room}")
    assert exported(*room.split(".")) == set(package.__all__)
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value):
            assert public_path(f"{value.__module__}.{name}") == f"randlora_pl.{room}.{name}"


@pytest.mark.parametrize("room", ROOMS)
def test_an_exported_class_shares_its_name_with_no_other_of_the_room(room: str) -> None:
    """A path is looked up by the name, whatever the module."""
    files = (Path(randlora_pl.__file__).parent / room.replace(".", "/")).rglob("*.py")
    defined = [name for file in files for name in re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE)]
    for name in exported(*room.split(".")):
        assert defined.count(name) == inspect.isclass(getattr(import_module(f"randlora_pl.{room}"), name)), name


@in_one_item(
    "path",
    [
        *("RandLoRA", "mine.RandLoRA", "mine.randlora_pl.adapters.RandLoRA", "lightning.pytorch.callbacks.Timer", ""),
        *(
            "randlora_pl",
            "randlora_pl.adapters",
            "randlora_pl.adapters.methods.randlora.Mine",
            "randlora_pl.gone.Mine",
        ),
        *(
            "randlora_pl.adapters.RandLoRA",
            "randlora_pl./adapters.RandLoRA",
            "randlora_pl.adapters.methods.lora.LoRA adapted",
        ),
    ],
)
def test_other_texts_stay(path: str) -> None:
    assert public_path(path) == path


def test_every_class_of_a_config() -> None:
    old = {
        "a": [{"class_path": "randlora_pl.run.callbacks.progress.PeakMemory", "init_args": {"n": 1}}, "mine.LoRA", None]
    }
    new = {"a": [{"class_path": "randlora_pl.run.callbacks.PeakMemory", "init_args": {"n": 1}}, "mine.LoRA", None]}
    assert with_public_paths(old) == new
