from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from randlora_pl.data.catalog import PAPER
from randlora_pl.lab.paper import PaperCell, averaged, cells, notes
from randlora_pl.lab.report import Printed, Table, TableCell, row
from randlora_pl.lab.report.accuracy import Beside
from randlora_pl.lab.report.cells import Key, ReportPlan, read_plan
from tests.lab.report.sweeps import description, sweep_yaml

B32, L14 = "CLIP-ViT-B/32", "CLIP-ViT-L/14"


@pytest.fixture
def beside(tmp_path: Path) -> Any:
    def make(**changes: Any) -> Beside:
        (tmp_path / "sweep.yaml").write_text(sweep_yaml(description(**changes)))
        return Beside(read_plan(tmp_path))

    return make


def test_labels_map(beside: Any) -> None:
    found = beside(paper={"tables": [11, 12]})
    assert found.cell(Key(B32, "cars", "1-shot", "LoRA-32")).value == 51.9  # LoRA32 in print
    assert found.cell(Key(B32, "oxfordpets", "1-shot", "full fine-tuning")).value == 70.0  # paper_name: FT
    assert found.cell(Key(L14, "cars", "100%", "RandLoRA-6")).value == 90.8  # paper_name for this model: RandLoRA10
    for key in (
        Key(B32, "cars", "1-shot", "LoRA-16"),
        Key(B32, "digits", "1-shot", "LoRA-32"),
        Key(B32, "cars", "8-shot", "LoRA-32"),
        Key("tiny", "cars", "1-shot", "LoRA-32"),
    ):
        assert found.cell(key) is None


def test_without_a_table_nothing_is_beside(beside: Any) -> None:
    found = beside(paper=None)
    assert found.cell(Key(B32, "cars", "1-shot", "LoRA-32")) is None
    assert found.average(B32, "1-shot", "LoRA-32", ["cars"]) is None
    assert found.cost(B32, "LoRA-32") == (None, None)


def test_averages_are_over_the_same_data_sets(beside: Any) -> None:
    found = beside(paper={"table": 11})
    average = found.average(B32, "1-shot", "LoRA-32", ["cars", "dtd"])
    assert average.value == pytest.approx(fmean([51.9, 46.3])) and average.printed is None
    assert found.average(B32, "1-shot", "LoRA-32", ["cars", "digits"]) is None
    everything = sorted(averaged(11))
    whole = found.average(B32, "4-shot", "RandLoRA-6", everything)
    assert whole.printed.value == 70.4 and whole.value == pytest.approx(70.459, abs=1e-3)


def test_tables_of_averages(beside: Any) -> None:
    methods = {
        "LoRA": {},
        "RandLoRA-b": {},
        "sparse": {"paper_name": "RandLoRA ternary sparsity 93%"},
        "RandLoRA ternary": {},
    }
    two, three = beside(paper={"table": 2}, methods=methods), beside(paper={"table": 3}, methods=methods)
    assert two.average(B32, "100%", "LoRA", PAPER).value == 83.74
    assert two.average(B32, "100%", "RandLoRA-b", PAPER).value == 85.32
    assert two.average(B32, "50%", "LoRA", PAPER) is None
    assert three.average(B32, "100%", "sparse", PAPER).value == 85.57
    assert three.average(B32, "100%", "RandLoRA ternary", PAPER) is None  # four of that name: which is not told
    for others in (["cars"], PAPER[1:], [*PAPER[1:], "digits"], [*PAPER, "digits"], []):
        assert two.average(B32, "100%", "LoRA", others) is None, "the paper's is over the 22 datasets"


def test_cost_of_table_ten(beside: Any) -> None:
    found = beside(paper={"tables": [11, 12]})
    values = {
        (model, method): [cell and cell.value for cell in found.cost(model, method)]
        for model in (B32, L14)
        for method in ("LoRA-32", "RandLoRA-6", "full fine-tuning", "LoRA-16", "RandLoRA-7")
    }
    assert values[B32, "LoRA-32"] == [90, 81] and values[B32, "RandLoRA-6"] == [113, 78]
    assert values[L14, "RandLoRA-6"] == [128, 71]  # called RandLoRA10 for this model
    assert values[B32, "full fine-tuning"] == [100, 100]
    assert values[B32, "LoRA-16"] == values[B32, "RandLoRA-7"] == [None, None]


def with_tables(*tables: object) -> ReportPlan:
    return replace(ReportPlan.unknown(), paper={"tables": [*tables]})


def test_unknown_tables_are_a_problem_to_tell() -> None:
    found = Beside(with_tables(99, 11))
    assert found.tables == ["11"] and "Table 99" in found.problems[0]


def printed(number: int, *labels: str) -> PaperCell:
    (found,) = [cell for cell in cells(number) if cell[1:5] == labels]
    return found


def annotated(beside: Beside, paper: Printed | None) -> tuple[tuple[int, ...], ...]:
    """The notes of caption, row, column and cell of a table that shows one printed number."""
    cell = TableCell("", paper=paper)
    table = Table("t", "", row("Method", "EuroSAT"), [[TableCell(""), cell]])
    beside.annotate(table)
    return table.notes, table.rows[0][0].notes, table.header[1].notes, cell.notes


def test_footnotes_are_counted_once_in_order() -> None:
    counted = Beside(ReportPlan.unknown())
    cell, plain = printed(12, L14, "RandLoRA10", "100%", "EuroSAT"), printed(12, L14, "FT", "100%", "Cars")
    caption, first, column, _ = annotated(counted, Printed(cell.value, (cell,)))
    assert [*caption, *first, *column] == list(range(1, len(counted.footnotes) + 1))
    others = annotated(counted, Printed(plain.value, (plain,)))
    assert others[0] == caption and set(others[1]) < set(first) and not others[2]
    touched = {note.text for note in notes() if note.touches(cell)}
    texts = {text for _, text, _ in counted.footnotes}
    assert texts == touched and "rank 8" in " ".join(texts) and "12 epochs" in " ".join(texts)
    assert annotated(counted, None) == ((), (), (), ())


def test_a_printed_average_that_is_off_is_told() -> None:
    cell = printed(11, B32, "RandLoRA6", "4-shot", "Average")
    counted = Beside(ReportPlan.unknown())
    (number,) = annotated(counted, Printed(70.459, (cell,), cell))[3]
    assert "70.4; the mean of its printed cells is 70.46" in counted.footnotes[number - 1][1]
    assert annotated(counted, Printed(70.44, (cell,), cell))[3] == annotated(counted, Printed(70.459, (cell,)))[3] == ()
