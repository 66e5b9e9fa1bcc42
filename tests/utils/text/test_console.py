import logging
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from randlora_pl.utils.text import log_to_file, log_to_terminal, print_above_progress


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
