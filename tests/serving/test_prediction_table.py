"""The CSV file of predictions is read back as what was said."""

import csv
import io
import os

import pytest

from randlora_pl.commands.predict import PredictionTable
from randlora_pl.utils.text import csv_text


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", "a\r", "\r\n", 'say "no", so', "a\u2028b"])
def test_texts_with_line_ends_come_back_whole(text: str) -> None:
    """A lone carriage return ends a line for whoever reads CSV files, and so stands in quotes."""
    found = PredictionTable(["one"], "prompts", ["prompt"], [[text], ["b"]], ["written"], "")
    found.add("one", 1, ["plain"])
    found.add("one", 0, [text])
    rows = list(csv.reader(io.StringIO(found.csv(), newline="")))
    assert rows == [["prompt", "written"], [text, text], ["b", "plain"]]
    assert found.csv().endswith("b,plain\n")


def test_cells_are_no_formulas_and_fit_into_a_file() -> None:
    text = csv_text([["=1+1", -1, os.fsdecode(b"\xff")]])
    assert text == "'=1+1,-1,\\udcff\n" and text.encode("utf-8")
