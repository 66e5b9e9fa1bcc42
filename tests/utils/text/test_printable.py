import logging
import os

import pytest

from randlora_pl.commands.common import entry
from randlora_pl.commands.main import main
from randlora_pl.utils.text import _Terminal, for_cell, for_figure, printable, table
from tests.support.products import in_one_item

TITLE = "\x1b]0;owned\x07"


@in_one_item(
    ("text", "expected"),
    [
        ("plain ünïcode 犬\ttab\n", "plain ünïcode 犬\ttab\n"),
        (TITLE, "\\x1b]0;owned\\x07"),
        (os.fsdecode(b"\xff.png"), "\\xff.png"),
        ("\u202eexe", "\\u202eexe"),
        ("\ud800\r\x9b", "\\ud800\\x0d\\x9b"),
    ],
)
def test_what_a_terminal_obeys_is_spelled_out(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_a_dollar_sign_begins_no_formula() -> None:
    from matplotlib.text import Text

    assert Text()._preprocess_math(for_figure(r"$\foo$ and $5")) == (r"$\foo$ and $5", False)


def test_tables_errors_and_remarks_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([TITLE]) == 2
    record = logging.LogRecord("a", logging.INFO, "", 0, TITLE, (), None)
    shown = [*capsys.readouterr(), table(["a"], [[TITLE]]), entry("a", TITLE), _Terminal().format(record)]
    assert not any("\x1b" in text or "\x07" in text for text in shown)
    assert table(["a", "b"], [["two\nlines", None]]).count("\n") == 1


@in_one_item("text", ["=1+1", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "-", " =1"])
def test_a_cell_is_no_formula(text: str) -> None:
    assert for_cell(text) == f"'{text}"


@in_one_item("text", ["", "\r\n", "a=b", "-0.25", "+3", "-1e-05", "a -b"])
def test_numbers_and_other_cells_stay(text: str) -> None:
    assert for_cell(text) == text
