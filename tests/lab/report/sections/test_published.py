"""Reports of the shipped sweeps about prompts: the values of other papers, and appendix B.3, beside made results."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from randlora_pl.data.catalog import PAPER
from randlora_pl.lab.paper import PaperCell, averaged, cells, notes
from randlora_pl.lab.report import Document, Printed, Table, TableCell, markdown, row
from randlora_pl.lab.report.accuracy import Beside
from randlora_pl.lab.report.cells import Key, ReportPlan, read_plan
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import build
from randlora_pl.run.options.shipped import find_config
from tests.lab.report.sweeps import Labels, description, sweep_yaml, write_sweep
from tests.lab.report.test_tables import cell_of


def report(folder: Path, name: str, figures: Callable[[Labels], dict[str, Any]], *methods: str) -> Document:
    """The report of a shipped sweep of which cells of 4 and 16 shots are finished, with some methods and one seed."""
    content = yaml.safe_load(find_config(name).read_text(encoding="utf-8")) | {"seeds": [1]}
    keep = lambda cell: cell["method"] in methods and cell["budget"] in ("4-shot", "16-shot", "zero-shot")  # noqa: E731
    zeroshot = "zero-shot" in content["methods"]
    sweep = read_sweep(write_sweep(folder, content, keep, more=figures, zeroshot=zeroshot))
    assert not sweep.warnings
    return build(sweep)


def part(document: Document, name: str) -> Table:
    (found,) = (part for section in document.sections for part in section.parts if part.name.startswith(name))
    assert isinstance(found, Table)
    return found


def notes_of(document: Document, table: Table, method: str, *row: str) -> str:
    """The footnotes of a method with their sources, in one text."""
    numbers = cell_of(table, "Method", method, *row).notes
    return " ".join(f"{text} ({source})" for number, text, source in document.footnotes if number in numbers)


def test_few_shot(tmp_path: Path) -> None:
    document = report(tmp_path, "few_shot", lambda labels: {"test/acc": 0.75}, "MaPLe", "CLIP-LoRA", "RandLoRA-10")
    cells, averages = part(document, "accuracy-"), part(document, "averages-")
    assert cell_of(cells, "dtd", "MaPLe", "16-shot").below == "published 71.33 (+3.7)"
    assert cell_of(cells, "dtd", "CLIP-LoRA", "16-shot").below == "published 72.0 (+3.0)"
    assert cell_of(cells, "dtd", "MaPLe", "4-shot").below == "" == cell_of(cells, "dtd", "RandLoRA-10", "16-shot").below
    assert cell_of(averages, "4-shot", "MaPLe").below == "published 75.37 (-0.4)", "printed without its cells"
    assert cell_of(averages, "16-shot", "MaPLe").below == "published 81.8 (-6.8)", "the mean of its cells"
    assert cell_of(averages, "4-shot", "CLIP-LoRA").below == "published 77.32 (-2.3)"
    told = notes_of(document, averages, "MaPLe")
    assert "arXiv 2307.06948" in told and "not published" in told and "84.50" in told
    told = notes_of(document, averages, "CLIP-LoRA")
    assert "arXiv 2405.18541" in told and "72.20" in told and "later paper" in told
    text = markdown(document)
    assert "the paper's value" not in text and 'ours minus theirs: "published"' in text and "no seed repeats" in text


def test_base_to_new(tmp_path: Path) -> None:
    methods = ("CoOp", "MaPLe + DePT", "2SFS (LoRA-2)", "zero-shot", "RandLoRA-10")
    document = report(tmp_path, "base_to_new", lambda labels: {"test/acc": 0.8, "test/new/acc": 0.7}, *methods)
    table = part(document, "new-classes-")
    below = {
        (column, method): cell_of(table, column, method).below
        for column in ("dtd", "Base", "New", "H")
        for method in methods
    }
    assert below["dtd", "CoOp"] == "H 74.7 · published 79.44 / 41.18, H 54.2 (+20.4)"
    assert below["dtd", "2SFS (LoRA-2)"] == "H 74.7" == below["dtd", "RandLoRA-10"], "averages alone, or nothing"
    averages = ["published 85.55 (-5.5)", "published 75.48 (-5.5)", "published 80.2 (-5.5)"]
    assert [below[column, "2SFS (LoRA-2)"] for column in ("Base", "New", "H")] == averages
    assert below["H", "MaPLe + DePT"] == "published 79.5 (-4.9)"
    assert cell_of(part(document, "accuracy-"), "dtd", "CoOp", "16-shot").below == "published 79.44 (+0.6)"
    assert "200 epochs" in notes_of(document, table, "CoOp") and "Table 1" in notes_of(document, table, "CoOp")
    assert "mixes logits" in notes_of(document, table, "MaPLe + DePT")
    assert "layer norms" in notes_of(document, table, "2SFS (LoRA-2)")


def test_cross_dataset(tmp_path: Path) -> None:
    content = yaml.safe_load(find_config("cross_dataset").read_text(encoding="utf-8"))
    others = content["set"]["trainer.callbacks"][0]["init_args"]["datasets"]
    figures = {"test/acc": 0.7} | {f"test/elsewhere/{name}": 0.6 for name in others}
    methods = ("CoOp", "MaPLe", "MaPLe + DePT", "CLIP-LoRA")
    document = report(tmp_path / "whole", "cross_dataset", lambda labels: figures, *methods)
    table = part(document, "transfer-")
    means = ("Mean of other datasets", "Mean of shifted test sets")
    columns = ("There", "eurosat", "imagenet_v2", *means)
    for method, printed in (
        ("MaPLe", ["70.72 (-0.7)", "48.06 (+11.9)", "64.07 (-4.1)", "66.3 (-6.3)", "60.3 (-0.3)"]),
        ("MaPLe + DePT", ["70.97 (-1.0)", "", "64.33 (-4.3)", "64.56 (-4.6)", "60.2 (-0.2)"]),
    ):
        found = [cell_of(table, column, method).below for column in columns]
        assert found == [each and f"published {each}" for each in printed]
    told = notes_of(document, table, "MaPLe + DePT")
    assert "arXiv 2309.07439" in told and "73.27" in told and "Table 3" in notes_of(document, table, "CoOp")
    assert all(cell_of(table, column, "CLIP-LoRA").below == "" for column in columns)
    fewer = {name: value for name, value in figures.items() if "eurosat" not in name and "imagenet_a" not in name}
    table = part(report(tmp_path / "fewer", "cross_dataset", lambda labels: fewer, *methods), "transfer-")
    assert cell_of(table, means[0], "MaPLe + DePT").below == "", "the printed mean is of ten"
    assert cell_of(table, means[0], "MaPLe").below == "published 68.3 (-8.3)", "the mean of nine"


def test_table_5(tmp_path: Path) -> None:
    def figures(labels: Labels) -> dict[str, Any]:
        cost = {"fit_seconds": 3600.0, "peak_memory_bytes": 5_000_000_000, "device": "cuda"}
        own = labels["dataset"] == "imagenet" and labels["budget"] == "16-shot"
        return {"test/acc": 0.8} | (cost if own else cost | {"fit_seconds": 10.0, "peak_memory_bytes": 10**9})

    document = report(tmp_path, "table5", figures, "LoRA-16", "RandLoRA-10", "MaPLe + DePT", "CLIP-LoRA")
    cost, columns = part(document, "cost-"), ("ImageNet, seconds", "ImageNet, peak memory in GB")
    for method, printed in (
        ("MaPLe + DePT", ["paper 12,600 (-9,000.0)", "paper 18 (-13.0)"]),
        ("RandLoRA-10", ["paper 120 (+3,480.0)", "paper 4.5 (+0.5)"]),
        ("LoRA-16", ["", ""]),
    ):
        assert [cell_of(cost, column, method).text for column in columns] == ["3,600.0", "5.0"]
        assert [cell_of(cost, column, method).below for column in columns] == printed
    titles = [cell for cell in cost.header if cell.text in columns]
    assert {cell.below for cell in titles} == {"16-shot"} and all(cell.notes for cell in titles)
    averages = part(document, "averages-")
    assert cell_of(averages, "16-shot", "CLIP-LoRA").below == "published 78.9 (+1.1)"
    assert cell_of(averages, "16-shot", "MaPLe + DePT").below.startswith("paper 78.7")
    assert cell_of(averages, "16-shot", "RandLoRA-10").below == "paper 79.6 (+0.4)"
    lead = " ".join(next(section for section in document.sections if section.name == "averages").text)
    assert "Table 5 of Albert" in lead and '"published"' in lead and "few_shot" not in lead


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
    known = Key(B32, "cars", "1-shot", "LoRA-32")
    for other in ({"method": "LoRA-16"}, {"dataset": "digits"}, {"budget": "8-shot"}, {"model": "tiny"}):
        assert found.cell(known._replace(**other)) is None
    found = beside(paper=None)
    assert found.cell(known) is None
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
    methods = {"LoRA": {}, "RandLoRA-b": {}, "RandLoRA ternary": {}}
    methods |= {"sparse": {"paper_name": "RandLoRA ternary sparsity 93%"}}
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
