"""Signatures with the options that constructors pass on."""

import inspect
from typing import Any

import pytest

from randlora_pl.adapters import LoRA
from randlora_pl.data import ImageData
from randlora_pl.tasks import LinearHeadTask
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.signatures import whole_signature


class Base:
    def __init__(self, *, name: str, rate: float = 0.1, steps: int = 3) -> None:
        self.name, self.rate, self.steps = name, rate, steps


class Passing(Base):
    fixed_options = ("steps",)

    def __init__(self, name: str = "a", *, depth: int = 2, **options: Any) -> None:
        super().__init__(name=name, steps=depth, **options)


class Same(Passing):
    pass


class Closed(Passing):
    def __init__(self, width: int) -> None:
        super().__init__(depth=width)


def test_options_of_bases_follow_those_of_the_class_without_the_fixed_ones() -> None:
    for kind in (Passing, Same):
        found = whole_signature(kind).parameters
        assert list(found) == ["name", "depth", "rate"]
        assert found["name"].default == "a" and found["rate"].annotation is float
        assert kind(**{name: option.default for name, option in found.items()}).rate == 0.1


def test_a_constructor_that_passes_nothing_on_hides_its_bases() -> None:
    assert list(whole_signature(Closed).parameters) == ["width"]
    assert whole_signature(Base).parameters == inspect.signature(Base).parameters


@pytest.mark.parametrize(
    ("kind", "option", "meant"),
    [
        (LoRA, "r", "rank"),
        (LoRA, "lora_alpha", "alpha"),
        (LinearHeadTask, "lr", "learning_rate"),
        (ImageData, "step", "steps"),
    ],
)
def test_an_unknown_option_names_its_class_and_what_was_meant(kind: type, option: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no option '{option}'. Did you mean '{meant}'\?"):
        kind(**{option: 1})
    with pytest.raises(TypeError, match="xyzzy"):
        kind(xyzzy=1)


def test_a_name_is_no_adapter_of_a_task() -> None:
    with pytest.raises(UserError, match="a method such as RandLoRA"):
        LinearHeadTask(name="tiny", adapter="RandLoRA")
