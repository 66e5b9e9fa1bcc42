"""Texts for people: tables, numbers, logs, and what a terminal does with them."""

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from randlora_pl.commands.common import entry
from randlora_pl.commands.main import main
from randlora_pl.utils.text import (
    MOST_PACKED,
    _Terminal,
    duration,
    filter_library_warnings,
    for_cell,
    for_figure,
    group_names,
    log_to_file,
    log_to_terminal,
    pack_bits,
    print_above_progress,
    printable,
    table,
    unpack_bits,
)
from tests.support.products import in_one_item


def test_log_gets_what_was_printed_and_what_was_warned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_terminal()
    table = Table(box=None, show_header=False)
    table.add_row("left", "right")
    with log_to_file(tmp_path / "run.log"):
        print_above_progress("a command " + "x" * 200, table)
        logging.getLogger("randlora_pl").warning("a remark")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a warning", stacklevel=1)
    print_above_progress("after")
    shown, text = capsys.readouterr(), (tmp_path / "run.log").read_text()
    for words in ("x" * 200, "left", "right"):
        assert words in shown.out and words in text
        assert words not in shown.err  # once is enough
    assert "remark" in shown.err and "a remark" in text
    assert "a warning" in text and "a warning" not in shown.err
    assert "after" not in text and "after" in shown.out


def test_a_notebook_is_told_once_and_the_log_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = type("ZMQInteractiveShell", (), {})  # by which rich knows Jupyter
    monkeypatch.setattr("builtins.get_ipython", shell, raising=False)
    assert Console().is_jupyter
    log_to_terminal()
    with log_to_file(tmp_path / "run.log"):
        print_above_progress("accuracy 99 %")
    assert capsys.readouterr().out == "accuracy 99 %\n"
    assert "accuracy 99 %" in (tmp_path / "run.log").read_text()


def test_handlers_are_not_piled_up() -> None:
    log_to_terminal()
    before = list(logging.getLogger("randlora_pl").handlers)
    log_to_terminal()
    assert logging.getLogger("randlora_pl").handlers == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_full_disk_does_not_fill_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log_to_terminal()
    with log_to_file(Path("/dev/full")):
        print_above_progress("a command")
        logging.getLogger("randlora_pl").warning("a remark")
    shown = capsys.readouterr()
    assert "a command" in shown.out and shown.err == "randlora-pl: a remark\n"


def test_what_is_long_is_told_less_exactly() -> None:
    told = {
        0.4: "0 s", 89: "89 s", 90: "2 min", 3_540: "59 min", 3_590: "1 h 00 min", 7_500: "2 h 05 min",
        35_940: "9 h 59 min", 36_000: "10 h", 250_000: "69 h", 259_200: "3 days", 1_332_617 * 3_600: "55,526 days",
    }  # fmt: skip
    assert {seconds: duration(seconds) for seconds in told} == told
    assert duration(1.26, 1) == "1.3 s" and duration(126, 1) == "2 min"


LIGHTNING = ("lightning.pytorch", "lightning.fabric")


@pytest.fixture(autouse=True)
def levels() -> Iterator[None]:
    before = {name: logging.getLogger(name).level for name in LIGHTNING}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.parametrize(
    "remark",
    [
        "The 'train_dataloader' does not have many workers which may be a bottleneck.",
        "Total length of `list` across ranks is zero. Please make sure this was your intention.",
    ],
)
def test_remarks_are_hidden_and_warnings_are_not(remark: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in LIGHTNING:
        logging.getLogger(name).setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.warn(remark, stacklevel=1)
        filter_library_warnings()
        warnings.warn(remark, stacklevel=1)
        warnings.warn_explicit("Corrupt EXIF data.", UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin")
        warnings.warn("the loss is strange", stacklevel=1)
    assert [str(each.message) for each in told] == [remark, "the loss is strange"]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").info("GPU available: False")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").warning("no GPU")
    assert "no GPU" in caplog.text and "GPU available" not in caplog.text


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ({"a.0.fc": 3, "a.1.fc": 3, "fc": 3}, ["a.*.fc", "fc"]),
        ({"s.0.b.0.fc": 3, "s.0.b.1.fc": 3, "s.1.b.0.fc": 5, "s.2.b.0.fc": 5}, ["s.0.b.*.fc", "s.{1,2}.b.*.fc"]),
        ({"s.0.0.c": 1, "s.0.1.c": 2, "s.1.0.c": 3, "s.1.1.c": 4}, ["s.0.0.c", "s.0.1.c", "s.1.0.c", "s.1.1.c"]),
        ({"s.0.0.c": 1, **{f"s.0.{n}.c": 2 for n in range(1, 5)}}, ["s.*.0.c", "s.*.{1-4}.c"]),
        ({"0.1": 2, "1.1": 4}, ["0.1", "1.1"]),
    ],
)
def test_groups_of_other_shapes_keep_the_numbers_in_which_they_differ(
    names: dict[str, int], patterns: list[str]
) -> None:
    assert [name for name, _ in group_names(names.items())] == patterns


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_values_come_back(values: list[bool]) -> None:
    back = unpack_bits(pack_bits(values))
    assert back is not None and back.tolist() == values


@in_one_item(
    "damaged", [None, 7, "", "8", "8:", "9:/w==", "-1:/w==", "x:/w==", "8:/w", "8:é", f"{10 * MOST_PACKED}:AA=="]
)
def test_damaged_text_is_nothing(damaged: object) -> None:
    assert unpack_bits(damaged) is None


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


def test_columns_are_aligned_and_the_widest_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = table(("a", "bc", "n"), [("  long name", "word " * 10, 1), (None, "x", 1000)], right=(2,))
    assert text.splitlines() == [
        "a            bc                        n",
        "  long name  word word word word       1",
        "             word word word word",
        "             word word",
        "             x                      1000",
    ]


def test_nothing_is_wrapped_or_left_out_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert table(("a", "bc"), [("y" * 99, "x" * 999)], optional=("a",)).endswith("y  " + "x" * 999)


@in_one_item("width", [12, 20, 33, 60, 150])
def test_no_line_is_longer_than_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    cells = [("name_of_a_thing", "some words " * 9, 4), ("a", "/path/without/spaces" * 5, 10**6)]
    text = table(("first", "second", "n"), cells)
    assert max(map(len, text.splitlines())) <= width
    for cell in ("".join(str(cell).split()) for row in cells for cell in row):
        assert all(text.count(letter) >= cell.count(letter) for letter in set(cell)), "nothing is lost"


def test_columns_have_a_letter_on_the_narrowest_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "5")
    assert table(("ab", "cd", "ef"), []).splitlines() == ["a  c  e", "b  d  f"]


def test_a_narrow_terminal_leaves_optional_columns_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        return table(("name", "license", "text"), [("x" * 10, "MIT" * 4, "two words " * 9)], optional=("license",))

    assert "MIT" in shown(50) and "left out" not in shown(50)
    assert "MIT" not in shown(49) and shown(49).endswith("(left out to fit the terminal: license)")


def test_numbers_stay_whole_beside_a_long_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    lines = table(("layer", "norm of A", "n"), [("blocks.attn.in_proj_weight", 0.312345, 768)]).splitlines()
    assert lines == ["layer           norm of A  n", "blocks.attn.in  0.312345   768", "_proj_weight"]
