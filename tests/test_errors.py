"""Errors for users: near matches."""

import pytest

from randlora_pl.errors import UserError, near

METHODS = ["RandLoRA", "LoRA", "VeRA", "NoLA"]


@pytest.mark.parametrize(
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
