"""Errors for users: their parts, and near matches."""

import copy
import pickle

import pytest

from randlora_pl.utils.errors import TooLargeImageError, UnreadableImageError, UserError, errors_in, first_line, near
from tests.support.products import in_one_item

METHODS = ["RandLoRA", "LoRA", "VeRA", "NoLA"]


@in_one_item(
    ("word", "choices", "expected"),
    [
        ("digit", ["digits", "mnist"], " Did you mean 'digits'?"),
        ("RANDLORA", METHODS, " Did you mean 'RandLoRA' or 'LoRA' or 'NoLA'?"),
        ("lra", ["LoRA", "BitFit"], " Did you mean 'LoRA'?"),
        ("zzz", METHODS, ""),
        ("anything", [], ""),
    ],
)
def test_near(word: str, choices: list[str], expected: str) -> None:
    assert near(word, choices) == expected


def test_near_makes_at_most_so_many_suggestions() -> None:
    choices = [f"layer{number}" for number in range(9)]
    assert near("layer", choices).count("'layer") == 3
    assert near("layer", iter(choices), count=1).count("'layer") == 1


def test_a_user_error_is_its_message() -> None:
    with pytest.raises(UserError, match=r"^what is wrong; what to do\.$"):
        raise UserError("what is wrong; what to do.")


@in_one_item(
    ("error", "expected"),
    [
        (UserError("a.csv is empty.", "Write it again.", "a.csv"), "a.csv is empty. Write it again."),
        (UserError("no images in /data", "Get them: randlora-pl data get cars"), "no images in /data\nGet them: randl"),
        (UserError("the label 'x' is unknown", where="a.csv, line 3"), "the label 'x' is unknown in a.csv, line 3"),
        (UserError("the label is unknown.", "Mend it.", "a.csv"), "the label is unknown in a.csv. Mend it."),
    ],
)
def test_the_parts_of_an_error_are_joined_when_it_is_printed(error: UserError, expected: str) -> None:
    assert str(error).startswith(expected)
    assert len(str(error).splitlines()) <= 2


@in_one_item("kind", [UserError, UnreadableImageError, TooLargeImageError])
def test_an_error_keeps_its_parts_on_the_way_to_another_process(kind: type[UserError]) -> None:
    given = kind("what", "hint", "where")
    for error in (pickle.loads(pickle.dumps(given)), copy.copy(given)):
        assert (type(error), error.what, error.hint, error.where) == (kind, "what", "hint", "where")


def test_places_are_put_in_front_of_an_error_once() -> None:
    with pytest.raises(UnreadableImageError) as caught, errors_in("sweep.yaml"), errors_in("sweep.yaml"):
        raise UnreadableImageError("it is empty.", "Replace it.")
    assert (str(caught.value), caught.value.hint) == ("sweep.yaml: it is empty. Replace it.", "Replace it.")
    with pytest.raises(UserError, match=r"^sweep.yaml: datasets.cars: it is empty$"), errors_in("sweep.yaml"):
        raise UserError("it is empty").within("datasets.cars")


def test_first_line_is_short() -> None:
    assert first_line(ValueError("a\nb")) == "a"
    assert first_line(ValueError("a:\n  b\nc")) == "a: b" and first_line(ValueError("a:")) == "a:"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 999))) == 160
