"""Options of classes: declared as fields, checked by their types."""

import inspect
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict

import pytest

from randlora_pl.adapters import LoRA
from randlora_pl.data import ImageData
from randlora_pl.tasks import LinearHeadTask
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.options import (
    Count,
    Declared,
    Fraction,
    NotNegative,
    Positive,
    Probability,
    at_least,
    between,
    check_options,
    literal_words,
    misfit,
    option_types,
)
from tests.support.products import in_one_item

Rank = Count | dict[str, Count]


class Layer(TypedDict):
    size: Count
    bias: NotRequired[bool]


@in_one_item(
    ("kind", "value", "wanted"),
    [
        (int, True, "a whole number"),
        (int, 2.5, "a whole number"),
        (int, 2**63, "a whole number"),
        (float, "1", "a number"),
        (bool, 0, "true or false"),
        (str, 5, "a text"),
        (str | None, 5, "a text"),
        (Count, 0, "a positive whole number"),
        (Count, 2.5, "a positive whole number"),
        (Annotated[float, Positive], float("nan"), "a positive number"),
        (Annotated[float, Positive], float("inf"), "a positive number"),
        (Annotated[float, NotNegative], -1, "0 or a positive number"),
        (Annotated[int, at_least(4)], 3, "a whole number of at least 4"),
        (Annotated[int, between(2, 1_000_000)], "x", "a whole number from 2 to 1,000,000"),
        (Annotated[float, Fraction], "x", "a number from 0 to 1"),
        (Annotated[float, Fraction], 1.5, "a number from 0 to 1"),
        (Annotated[float, Probability], 1, "a number from 0 to below 1"),
        (Rank, 0, "a positive whole number"),
        (Rank, "x", "a positive whole number or a mapping such as {pattern: value}"),
        (int | Literal["ceil", "sqrt"] | None, "x", "a whole number, ceil or sqrt"),
        (Literal["a", "b", "c"], "d", "a, b or c"),
        (Literal[1], True, "1"),
        (list[int], 5, "a list such as [0.5,1]"),
        (list[str], "mlp", "a list such as [a,b]"),
        (tuple[float, float], [1], "a list of 2"),
        (Declared, 5, "an object of Declared"),
    ],
)
def test_a_value_without_the_type_is_described_by_what_is_wanted(kind: Any, value: Any, wanted: str) -> None:
    wrong = misfit(value, kind, "it")
    assert wrong is not None and (wrong.name, wrong.value, wrong.wanted) == ("it", value, wanted)


@in_one_item(
    ("kind", "value"),
    [
        (float, 1),
        (int | None, None),
        (Rank, {".*mlp": 4}),
        (Literal["a", 1], 1),
        (tuple[float, float], [0, 1]),
        (tuple[int, ...], [1, 2, 3]),
        (Annotated[float, Fraction], 0),
        (Annotated[float, Probability], 0.5),
        (Annotated[int, NotNegative], 0),
        (dict[str, Any], {"a": object()}),
        ("Unknown", 5),
        (Any, 5),
        (Layer, {"size": 1, "more": "x"}),
    ],
)
def test_a_value_with_the_type_fits(kind: Any, value: Any) -> None:
    assert misfit(value, kind) is None


@in_one_item(
    ("kind", "value", "message"),
    [
        (Rank, {".*mlp": 0}, "it..*mlp is 0"),
        (list[Count], [1, -1], "it[1] is -1"),
        (list[Rank], [1, {"a": 0}], "it[1].a is 0"),
        (Layer, {"size": 0}, "it.size is 0"),
        (Layer, {"size": 1, "bias": 1}, "it.bias is 1"),
        (Layer, {}, "it.size is missing"),
        (Layer, 5, "it is 5"),
    ],
)
def test_the_part_that_does_not_fit_is_named(kind: Any, value: Any, message: str) -> None:
    assert str(misfit(value, kind, "it")) == message


def test_words_of_a_type_are_those_of_its_literals() -> None:
    assert literal_words(int | Literal["ceil", "floor+1", 3] | list[Literal["a"]] | None) == ["ceil", "floor+1", "a"]


class Old:
    """A base with a constructor of its own, like a Lightning module."""

    def __init__(self) -> None:
        self.made = True


class Shape(Declared, Old):
    """Base with options."""

    kind: ClassVar[str] = "shape"
    rank: Rank = 4
    """Rank r."""
    mode: "Literal['fast', 'low']" = "fast"
    """Speed."""
    inner: int = field(init=False, default=7)

    def __post_init__(self) -> None:
        Old.__init__(self)
        check_options(self)
        self.inner += 1


class Square(Shape):
    """Its child, with an option of its own and another default."""

    rank: Rank = 2
    """Rank r."""
    size: Count
    """Side."""


def test_each_subclass_has_its_options_and_those_of_its_base() -> None:
    square = Square(size=3)
    assert (square.rank, square.mode, square.size, square.inner, square.made) == (2, "fast", 3, 8, True)
    assert option_types(Square) == {"rank": Rank, "mode": Literal["fast", "low"], "size": Count}
    square.rank = 5  # mutable
    assert square != Square(size=3) and len({square, Square(size=3)}) == 2
    with pytest.raises(TypeError, match="positional"):
        Square(3)  # type: ignore[call-arg]


@in_one_item(
    ("options", "message"),
    [
        ({"size": 0}, "Square: size is 0. Set a positive whole number."),
        ({"size": 1, "rank": {"a": -1}}, "Square: rank.a is -1. Set a positive whole number."),
        ({"size": 1, "mode": "fats"}, "Square: mode is 'fats'. Did you mean 'fast'? Set fast or low."),
    ],
)
def test_an_object_refuses_options_of_other_types(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Square(**options)
    assert str(error.value) == message


def test_an_option_without_its_type_is_refused_at_the_class() -> None:
    with pytest.raises(TypeError, match="rank is an option: give its type, too, as in `rank: int = 4`"):

        class Wrong(Shape):
            rank = 4


def test_a_constructor_is_refused_at_the_class() -> None:
    with pytest.raises(TypeError, match="Wrong has a constructor"):

        class Wrong(Shape):
            def __init__(self, width: int) -> None: ...


def test_help_shows_own_options_first() -> None:
    assert list(inspect.signature(Square).parameters) == ["rank", "size", "mode"]
    assert inspect.signature(Square).parameters["mode"].annotation == Literal["fast", "low"]


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
    with pytest.raises(UserError, match=r"adapter is .* Set an object of Adapter, such as adapter=RandLoRA\(\)"):
        LinearHeadTask(name="tiny", adapter="RandLoRA")
