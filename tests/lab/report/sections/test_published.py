"""Reports of the shipped sweeps about prompts: the values of other papers, and appendix B.3, beside made results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from randlora_pl.lab.report import Document, Table, markdown
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import build
from randlora_pl.run.options.shipped import find_config
from tests.lab.report.sweeps import Labels, write_sweep
from tests.lab.report.test_tables import cell_of


def report(folder: Path, name: str, figures: Callable[[Labels], dict[str, Any]]) -> Document:
    """The report of a shipped sweep of which the cells of 4 and 16 shots are finished, with one seed."""
    content = yaml.safe_load(find_config(name).read_text(encoding="utf-8")) | {"seeds": [1]}
    sweep = read_sweep(
        write_sweep(
            folder,
            content,
            keep=lambda labels: labels["budget"] in ("4-shot", "16-shot", "zero-shot"),
            more=figures,
            zeroshot="zero-shot" in content["methods"],
        )
    )
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
    document = report(tmp_path, "few_shot", lambda labels: {"test/acc": 0.75})
    cells, averages = part(document, "accuracy-"), part(document, "averages-")
    assert cell_of(cells, "dtd", "MaPLe", "16-shot").below == "published 71.33 (+3.7)"
    assert cell_of(cells, "dtd", "CLIP-LoRA", "16-shot").below == "published 72.0 (+3.0)"
    assert cell_of(cells, "dtd", "MaPLe", "4-shot").below == "" == cell_of(cells, "dtd", "RandLoRA-10", "16-shot").below
    assert cell_of(averages, "4-shot", "MaPLe").below == "published 75.37 (-0.4)", "printed without its cells"
    assert cell_of(averages, "16-shot", "MaPLe").below == "published 81.8 (-6.8)", "the mean of its cells"
    assert cell_of(averages, "16-shot", "CLIP-LoRA").below == "published 83.0 (-8.0)"
    assert cell_of(averages, "4-shot", "CLIP-LoRA").below == "published 77.32 (-2.3)"
    told = notes_of(document, averages, "MaPLe")
    assert "arXiv 2307.06948" in told and "not published" in told and "84.50" in told
    told = notes_of(document, averages, "CLIP-LoRA")
    assert "arXiv 2405.18541" in told and "72.20" in told and "later paper" in told
    text = markdown(document)
    assert "the paper's value" not in text and 'ours minus theirs: "published"' in text and "no seed repeats" in text


def test_base_to_new(tmp_path: Path) -> None:
    document = report(tmp_path, "base_to_new", lambda labels: {"test/acc": 0.8, "test/new/acc": 0.7})
    table = part(document, "new-classes-")
    below = {
        (column, method): cell_of(table, column, method).below
        for column in ("dtd", "Base", "New", "H")
        for method in ("CoOp", "MaPLe + DePT", "PromptSRC", "2SFS (LoRA-2)", "zero-shot", "RandLoRA-10")
    }
    assert below["dtd", "CoOp"] == "H 74.7 · published 79.44 / 41.18, H 54.2 (+20.4)"
    assert below["dtd", "2SFS (LoRA-2)"] == "H 74.7" == below["dtd", "RandLoRA-10"], "averages alone, or nothing"
    assert [below[column, "2SFS (LoRA-2)"] for column in ("Base", "New", "H")] == [
        "published 85.55 (-5.5)",
        "published 75.48 (-5.5)",
        "published 80.2 (-5.5)",
    ]
    assert (
        below["H", "MaPLe + DePT"] == "published 79.5 (-4.9)" and below["New", "PromptSRC"] == "published 76.1 (-6.1)"
    )
    assert below["Base", "zero-shot"].startswith("published 69.3") and below["H", "RandLoRA-10"] == ""
    assert cell_of(part(document, "accuracy-"), "dtd", "CoOp", "16-shot").below == "published 79.44 (+0.6)"
    assert "200 epochs" in notes_of(document, table, "CoOp") and "Table 1" in notes_of(document, table, "CoOp")
    assert "mixes logits" in notes_of(document, table, "MaPLe + DePT")
    assert "layer norms" in notes_of(document, table, "2SFS (LoRA-2)")


def test_cross_dataset(tmp_path: Path) -> None:
    content = yaml.safe_load(find_config("cross_dataset").read_text(encoding="utf-8"))
    others = content["set"]["trainer.callbacks"][0]["init_args"]["datasets"]
    figures = {"test/acc": 0.7} | {f"test/elsewhere/{name}": 0.6 for name in others}
    document = report(tmp_path / "whole", "cross_dataset", lambda labels: figures)
    table = part(document, "transfer-")
    means = ("Mean of other datasets", "Mean of shifted test sets")
    columns = ("There", "eurosat", "imagenet_v2", *means)
    assert [cell_of(table, column, "MaPLe").below for column in columns] == [
        "published 70.72 (-0.7)",
        "published 48.06 (+11.9)",
        "published 64.07 (-4.1)",
        "published 66.3 (-6.3)",
        "published 60.3 (-0.3)",
    ]
    assert [cell_of(table, column, "MaPLe + DePT").below for column in columns] == [
        "published 70.97 (-1.0)",
        "",
        "published 64.33 (-4.3)",
        "published 64.56 (-4.6)",
        "published 60.2 (-0.2)",
    ]
    told = notes_of(document, table, "MaPLe + DePT")
    assert "arXiv 2309.07439" in told and "73.27" in told and "Table 3" in notes_of(document, table, "CoOp")
    assert all(cell_of(table, column, "CLIP-LoRA").below == "" for column in columns)
    fewer = {name: value for name, value in figures.items() if "eurosat" not in name and "imagenet_a" not in name}
    table = part(report(tmp_path / "fewer", "cross_dataset", lambda labels: fewer), "transfer-")
    assert cell_of(table, means[0], "MaPLe + DePT").below == "", "the printed mean is of ten"
    assert cell_of(table, means[0], "MaPLe").below == "published 68.3 (-8.3)", "the mean of nine"


def test_table_5(tmp_path: Path) -> None:
    def figures(labels: Labels) -> dict[str, Any]:
        cost = {"fit_seconds": 3600.0, "peak_memory_bytes": 5_000_000_000, "device": "cuda"}
        own = labels["dataset"] == "imagenet" and labels["budget"] == "16-shot"
        return {"test/acc": 0.8} | (cost if own else cost | {"fit_seconds": 10.0, "peak_memory_bytes": 10**9})

    document = report(tmp_path, "table5", figures)
    cost, columns = part(document, "cost-"), ("ImageNet, seconds", "ImageNet, peak memory in GB")
    assert [cell_of(cost, column, "MaPLe + DePT").text for column in columns] == ["3,600.0", "5.0"]
    assert [cell_of(cost, column, "MaPLe + DePT").below for column in columns] == [
        "paper 12,600 (-9,000.0)",
        "paper 18 (-13.0)",
    ]
    assert [cell_of(cost, column, "RandLoRA-10").below for column in columns] == [
        "paper 120 (+3,480.0)",
        "paper 4.5 (+0.5)",
    ]
    assert all(cell_of(cost, column, "LoRA-16").text in ("3,600.0", "5.0") for column in columns)
    assert all(cell_of(cost, column, "LoRA-16").below == "" for column in columns)
    titles = [cell for cell in cost.header if cell.text in columns]
    assert {cell.below for cell in titles} == {"16-shot"} and all(cell.notes for cell in titles)
    averages = part(document, "averages-")
    assert cell_of(averages, "16-shot", "CLIP-LoRA").below == "published 78.9 (+1.1)"
    assert cell_of(averages, "16-shot", "MaPLe + DePT").below.startswith("paper 78.7")
    assert cell_of(averages, "16-shot", "RandLoRA-10").below == "paper 79.6 (+0.4)"
    lead = " ".join(next(section for section in document.sections if section.name == "averages").text)
    assert "Table 5 of Albert" in lead and '"published"' in lead and "few_shot" not in lead
