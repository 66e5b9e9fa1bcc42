"""Cells copied by eye from the printed tables."""

import csv
import re
from statistics import fmean

import pytest

from randlora_pl.data.catalog import CATALOG, PAPER
from randlora_pl.lab.paper import Note, PaperCell, cells, column_of, datasets, notes, numbers, table
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
    return next((cell.value for cell in cells(number) if cell[1:5] == labels), None)


@in_one_item(("number", "model", "method", "budget", "column", "printed"), PRINTED)
def test_cells_are_the_printed_ones(
    number: int, model: str, method: str, budget: str, column: str, printed: float
) -> None:
    assert value(number, model, method, budget, column) == printed
    assert value(14, DINO, "FT", "100%", "ImageNet") is value(11, L14, "FT", "100%", "Cars") is None


@pytest.mark.parametrize("number", ["11", "12", "13", "14", "15"])
def test_printed_averages_are_means_of_the_cells(number: str) -> None:
    by_cell = table(number).pivot(index=["model", "method", "budget"], columns="column", values="value").dropna()
    means = by_cell.drop(columns="Average").mean(axis=1)
    off = list(by_cell.index[(means - by_cell["Average"]).abs() > 0.055])
    assert off == ([(B32, "RandLoRA6", "4-shot")] if number == "11" else [])


def test_shape() -> None:
    assert numbers()[:12] == ("2", "3", "4", "5", "6", "10", "11", "12", "13", "14", "15", "B.3")
    published = [number for number in numbers() if any(cell.source for cell in cells(number))]
    assert [*numbers()[12:]] == published and len(published) == 6
    for number in ("11", "12", "13", "14"):
        here, columns, methods = table(number), 22 if number == "14" else 23, 5
        assert list(here) == list(PaperCell._fields) and here["method"].nunique() == methods
        assert list(here["budget"].unique()) == ["1-shot", "2-shot", "4-shot", "16-shot", "50%", "100%"]
        assert here["column"].nunique() == columns and len(here) == methods * 6 * columns
    parameters = {(cell.table, *cell[1:4]): cell.params for number in (4, 11, 15) for cell in cells(number)}
    assert parameters["15", "Phi3", "RandLoRA-20", "15k"] == "1.16"
    assert parameters["4", "RoBERTa-large", "RandLoRA-100", "100%"] == "1.8M"
    assert parameters["11", B32, "FT", "100%"] == ""
    assert all((cell.std is None) == (number == 11) for number in (4, 11) for cell in cells(number))
    with pytest.raises(UserError, match="99"):
        table(99)


def test_published_zero_shot_accuracies_are_complete() -> None:
    by_model = {model: [c for c in cells("zero_shot") if c.model == model] for model in (B32, L14)}
    small, large = ([cell.value for cell in own] for own in by_model.values())
    assert {cell.column for cell in by_model[B32]} == {column_of(name) for name in PAPER}
    assert (len(large), round(fmean(small), 2), round(fmean(large), 2)) == (20, 60.50, 71.22), "the source's means"


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
    assert {column_of(name): CATALOG[name].counts["test"] for name in PAPER} == {
        column: row["test"] for column, row in rows.items()
    }, "the catalog agrees"


def test_no_cell_is_there_twice() -> None:
    from importlib.resources import files

    folder = files("randlora_pl.lab.paper")
    lines = [(folder / name).read_text().splitlines() for name in ("tables.csv", "published.csv")]
    labels = ("table", "model", "method", "budget", "column")
    rows = [tuple(row[name] for name in labels) for file in lines for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows)) == sum(len(cells(number)) for number in numbers())


BY_KEY = {note.key: note for note in notes()}
ALL = [cell for number in numbers() for cell in cells(number)]


@in_one_item("note", notes())
def test_every_note_touches_numbers_of_each_of_its_tables(note: Note) -> None:
    touched = [cell for cell in ALL if note.touches(cell)]
    assert {cell.table for cell in touched} == set(note.tables)
    assert 0 < len(touched) < len(ALL)
    assert note.text and note.source and "\n" not in note.text


def methods(key: str, number: int) -> set[str]:
    return {cell.method for cell in cells(number) if BY_KEY[key].touches(cell)}


def test_who_is_touched() -> None:
    assert methods("dead_attention", 11) == {"NoLA", "VeRA256", "LoRA32", "RandLoRA6"}
    assert methods("dead_attention", 5) == {"LoRA-16", "RandLoRA-10"}
    assert methods("logit_scale", 11) == {"NoLA", "VeRA256", "LoRA32", "RandLoRA6", "FT"}
    assert methods("maple_count", 5) == {"Maple + DePT"}
    for classes in (10, 1000):
        assert f"{3_555_072 + 2_048 + 513 * classes:,}" in BY_KEY["maple_count"].text
    assert methods("rank_l14", 12) == {"RandLoRA10"}
    for key, number in (("vera_scaling_of_language_models", 15), ("vera_of_roberta", 4)):
        assert {method[:4] for method in methods(key, number)} == {"VeRA"}
    touched = {(cell.column, cell.budget) for cell in cells(11) if BY_KEY["flowers"].touches(cell)}
    assert touched == {("Flowers102", "16-shot")}
    assert not any(BY_KEY["logit_scale"].touches(cell) for cell in cells(14))  # a linear head: no logit scale


def test_the_notes_about_averages_are_true() -> None:
    text = BY_KEY["relative_average"].text
    for method in ("RandLoRA6", "LoRA32"):
        of_method = [cell for cell in cells(11) if cell[1:4] == ("CLIP-ViT-B/32", method, "100%")]
        assert f"{fmean(cell.value for cell in of_method if cell.column != 'Average'):.1f}" in text
    for value in (cell.value for cell in cells(2) if cell.method in ("LoRA", "RandLoRA-6")):
        assert f"{value:.2f}" in text


@pytest.mark.parametrize(
    ("key", "widths", "counts"),
    [  # (width of the tower, layers); qkv is d x 3d, both MLP weights d x 4d
        ("matched_b32", [(768, 12), (512, 12)], {("LoRA", 32), ("RandLoRA", 6), ("floor", 6)}),
        ("matched_l14", [(1024, 24), (768, 12)], {("LoRA", 32), ("RandLoRA", 8), ("RandLoRA", 10)}),
        ("matched_h14", [(1280, 32), (1024, 24)], {("LoRA", 32), ("RandLoRA", 10)}),
        ("matched_dino", [(768, 12)], {("LoRA", 32), ("RandLoRA", 6)}),
        ("matched_five", [(768, 12), (512, 12)], {("LoRA", 16), ("floor", 10)}),
    ],
)
def test_the_notes_about_parameters_are_true(
    key: str, widths: list[tuple[int, int]], counts: set[tuple[str, int]]
) -> None:
    def count(kind: str, rank: int) -> int:
        total = 0
        for d, layers in widths:
            bases = d // rank + 1 if kind == "floor" else -(-d // rank)
            per_layer = rank * (4 * d + 5 * d + 5 * d) if kind == "LoRA" else 3 * bases * (rank + d)
            total += layers * per_layer
        return total

    expected = {f"{count(*one):,}" for one in counts}
    assert expected == set(re.findall(r"\d{1,3}(?:,\d{3}){2}", BY_KEY[key].text))
