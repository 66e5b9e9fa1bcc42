"""Signatures with the options that constructors pass on."""

import inspect
from typing import Any

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
