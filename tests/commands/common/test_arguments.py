"""Options declared by their defaults or types, and the checks that commands share."""

from argparse import Namespace
from pathlib import Path

import pytest

from randlora_pl.commands.common.arguments import CommandParser, check_output, check_parent, check_positive
from randlora_pl.utils.errors import UserError


def parser() -> CommandParser:
    made = CommandParser("try")
    made.add_options(batch_size=8, rate=0.5, rank=int, ranks=[int], part=("image", "text"), fast=False, output=Path)
    return made


def test_an_option_has_its_default_or_none() -> None:
    found = vars(parser().parse_args([]))
    assert found == {
        "batch_size": 8, "rate": 0.5, "rank": None, "ranks": None, "part": None, "fast": False, "output": None,
    }  # fmt: skip


def test_values_have_the_types_of_the_declaration() -> None:
    words = "--batch-size 4 --rate 1 --rank 2 --ranks 1 2 --part text --fast --output a/b"
    found = vars(parser().parse_args(words.split()))
    assert found == {
        "batch_size": 4, "rate": 1.0, "rank": 2, "ranks": [1, 2], "part": "text", "fast": True, "output": Path("a/b"),
    }  # fmt: skip
    assert isinstance(found["rate"], float)


def test_options_are_spelled_with_either_sign() -> None:
    made = parser()
    made.add_argument("--data.eval_batch_size", type=int)
    for word in ("--data.eval_batch_size=4", "--data.eval-batch-size=4", "--data.eval-batch_size=4"):
        found = made.parse_args(["--batch_size", "4", word, "--output", "a_b"])
        assert found.batch_size == getattr(found, "data.eval_batch_size") == 4 and found.output == Path("a_b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch-size", "many"], "invalid int value: 'many'"),
        (["--part", "tail"], "invalid choice: 'tail'"),
        (["--batchsize", "4"], "Did you mean '--batch-size'"),
        (["--rat", "1"], "unrecognized"),  # no abbreviations
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parser().parse_args(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_below_one_are_refused() -> None:
    check_positive(Namespace(some=None, sizes=[1, 2]), "some", "sizes")
    with pytest.raises(UserError, match="--new-sizes is 0"):
        check_positive(Namespace(new_sizes=[3, 0]), "new_sizes")


def test_outputs_are_replaced_only_by_option(tmp_path: Path) -> None:
    check_output(tmp_path, overwrite=True)
    check_output(tmp_path / "new")
    check_parent(tmp_path / "new")
    with pytest.raises(UserError, match="or --overwrite"):
        check_output(tmp_path, overwrite=False)
    with pytest.raises(UserError, match="overwritten"):
        check_output(tmp_path)
    with pytest.raises(UserError, match="mkdir -p"):
        check_parent(tmp_path / "missing" / "new")


def test_runs_are_found_with_options_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in "12":
        (tmp_path / "runs" / "a" / number).mkdir(parents=True)
        (tmp_path / "runs" / "a" / number / "config.yaml").touch()
    (tmp_path / "runs" / "a" / "latest").symlink_to("1")
    made = parser()
    made.add_argument("runs", nargs="+", type=Path)
    found = made.parse_intermixed_args(["runs/a/latest", "--batch_size", "4", "runs/a"])
    assert (found.runs, found.batch_size) == ([Path("runs/a/1"), Path("runs/a/2")], 4)
    assert made.parse_args([f"runs/a/{name}" for name in ("1", "2", "latest")]).runs == found.runs
