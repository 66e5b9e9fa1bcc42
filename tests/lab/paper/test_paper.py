"""Cells copied by eye from the printed tables."""

import csv
from statistics import fmean

import pytest

from randlora_pl.data.catalog import PAPER
from randlora_pl.lab.paper import PaperCell, cells, column_of, datasets, numbers, table
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

B32, L14, H14, DINO = "CLIP-ViT-B/32", "CLIP-ViT-L/14", "CLIP-ViT-H/14", "DINOv2-ViT-B/14"
PRINTED = [
    (11, B32, "NoLA", "1-shot", "Cars", 51.6),
    (11, B32, "LoRA32", "1-shot", "EuroSAT", 73.2),
    (11, B32, "RandLoRA6", "1-shot", "Average", 62.5),
    (11, B32, "FT", "2-shot", "UCF101", 71.6),
    (11, B32, "VeRA256", "4-shot", "ImageNet", 64.2),
    (12, L14, "RandLoRA10", "100%", "Cars", 90.8),
    (12, L14, "RandLoRA10", "100%", "Average", 90.0),
    (12, L14, "LoRA32", "16-shot", "FGVCAircraft", 56.7),
    (13, H14, "VeRA1024", "50%", "GTSRB", 96.2),
    (13, H14, "FT", "100%", "Country211", 30.1),
    (14, DINO, "RandLoRA6", "100%", "UCF101", 92.0),
    (14, DINO, "LoRA32", "1-shot", "SVHN", 14.6),
    (14, DINO, "NoLA", "50%", "Average", 88.9),
    (5, B32, "Maple + DePT", "4-shot", "Caltech101", 95.0),
    (2, B32, "RandLoRA-b", "100%", "rank 384", 85.32),
    (3, B32, "RandLoRA ternary", "100%", "sparsity 93%", 85.57),
    (10, L14, "RandLoRA", "", "training time (% of reference)", 128),
    (10, H14, "LoRA-32", "", "memory (% of reference)", 54),
    (15, "Qwen2", "RandLoRA-10", "15k", "HellaSwag", 31.16),
    (15, "LLama3", "RandLoRA-15", "170k", "Average", 85.83),
]


def value(number: int | str, *labels: str) -> float | None:
    """The printed number of a model, method, budget and column."""
    return next((cell.value for cell in cells(number) if cell[1:5] == labels), None)


@in_one_item(("number", "model", "method", "budget", "column", "printed"), PRINTED)
def test_cells_are_the_printed_ones(
    number: int, model: str, method: str, budget: str, column: str, printed: float
) -> None:
    assert value(number, model, method, budget, column) == printed


def test_what_is_not_printed_is_none() -> None:
    assert value(14, DINO, "FT", "100%", "ImageNet") is None
    assert value(11, L14, "FT", "100%", "Cars") is None


@pytest.mark.parametrize("number", ["11", "12", "13", "14", "15"])
def test_printed_averages_are_means_of_the_cells(number: str) -> None:
    by_cell = table(number).pivot(index=["model", "method", "budget"], columns="column", values="value").dropna()
    means = by_cell.drop(columns="Average").mean(axis=1)
    off = list(by_cell.index[(means - by_cell["Average"]).abs() > 0.055])
    assert off == ([(B32, "RandLoRA6", "4-shot")] if number == "11" else [])


def test_shape() -> None:
    assert numbers()[:12] == ("2", "3", "4", "5", "6", "10", "11", "12", "13", "14", "15", "B.3")
    others = ("base_to_new", "cross_dataset", "few_shot", "other_datasets", "shifted_datasets")
    published = {number for number in numbers() if any(cell.source for cell in cells(number))}
    assert numbers()[12:] == others and published == {*others}
    for number, methods in (("11", 5), ("12", 5), ("13", 5), ("14", 5)):
        here, columns = table(number), 22 if number == "14" else 23
        assert list(here) == list(PaperCell._fields) and here["method"].nunique() == methods
        assert list(here["budget"].unique()) == ["1-shot", "2-shot", "4-shot", "16-shot", "50%", "100%"]
        assert here["column"].nunique() == columns and len(here) == methods * 6 * columns
    parameters = {(cell.table, *cell[1:4]): cell.params for number in (4, 11, 15) for cell in cells(number)}
    assert parameters["15", "Phi3", "RandLoRA-20", "15k"] == "1.16"
    assert parameters["4", "RoBERTa-large", "RandLoRA-100", "100%"] == "1.8M"
    assert parameters["11", B32, "FT", "100%"] == ""


def test_standard_deviations_are_kept() -> None:
    assert all(cell.std is not None for cell in cells(4))
    assert all(cell.std is None for cell in cells(11))


def test_unknown_table() -> None:
    with pytest.raises(UserError, match="99"):
        table(99)


def test_our_names_are_the_papers() -> None:
    assert column_of("oxfordpets") == "OxfordIIITPet" == column_of("OxfordIIITPet")
    assert column_of("cars") == "Cars" and column_of("digits") is None
    found = [column_of(name) for name in PAPER]
    assert len(set(found)) == 22
    assert {cell.column for cell in cells(11)} - {"Average"} == set(found)
    for ours, theirs in zip(PAPER, found, strict=True):  # same order in both lists: no name is crossed
        assert theirs is not None and ours[:3] == theirs.lower()[:3]


def test_table_seven() -> None:
    rows = datasets()
    assert rows["ImageNet"] == {"classes": 1000, "train": 1276167, "val": 5000, "test": 50000, "epochs": 10}
    assert rows["EuroSAT"]["epochs"] == 12 and fmean(row["classes"] for row in rows.values()) > 100


def test_the_catalog_agrees_with_table_seven() -> None:
    from randlora_pl.data.catalog import CATALOG

    for name in PAPER:
        column = column_of(name)
        assert column is not None
        assert CATALOG[name].counts["test"] == datasets()[column]["test"], name


def test_no_cell_is_there_twice() -> None:
    from importlib.resources import files

    folder = files("randlora_pl.lab.paper")
    lines = [(folder / name).read_text().splitlines() for name in ("tables.csv", "published.csv")]
    labels = ("table", "model", "method", "budget", "column")
    rows = [tuple(row[name] for name in labels) for file in lines for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == sum(len(cells(number)) for number in numbers())
