import re
from statistics import fmean

import pytest

from randlora_pl.lab.paper import Note, cells, notes, numbers
from tests.support.products import in_one_item

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
