"""The matrix of differences to a reference, and the conclusion in words."""

from pathlib import Path

import pytest

from randlora_pl.lab.report import Table, TableCell
from randlora_pl.lab.report.cells import Key, Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.comparisons import comparisons, conclusion, matrix_table, references, versus_table
from tests.lab.report.sections.test_pairwise_tests import DATASETS, RATED, better_by, provenance, swept
from tests.lab.report.sweeps import METHODS, MODELS, description, write_sweep

B32 = "CLIP-ViT-B/32"
THREE = RATED | {"VeRA-256": METHODS["VeRA-256"] | {"learning_rate": 0.01}}


def told(sweep: Sweep) -> tuple[list[str], Table]:
    """The conclusion, and the matrix of the first model."""
    found = comparisons(sweep)
    compared = references(sweep, found)
    return conclusion(sweep, found, compared), matrix_table(sweep, compared[0])


def row_of(table: Table, method: str) -> dict[str, TableCell]:
    (cells,) = [row for row in table.rows if row[0].text == method]
    return {f"{title.text} {title.below}".strip(): cell for title, cell in zip(table.header, cells, strict=True)}


@pytest.mark.parametrize(
    ("methods", "reference"),
    [
        (["LoRA-16", "LoRA-32", "RandLoRA-6", "full fine-tuning"], "LoRA-32"),  # the nearest to RandLoRA's size
        (["VeRA-256", "RandLoRA-6", "full fine-tuning"], "full fine-tuning"),
        (["VeRA-256", "NoLA"], "VeRA-256"),
    ],
)
def test_the_reference(tmp_path: Path, methods: list[str], reference: str) -> None:
    content = description(models={B32: {}}, datasets=["cars"], methods={name: METHODS[name] for name in methods})
    sweep = read_sweep(write_sweep(tmp_path, content))
    (found,) = references(sweep, comparisons(sweep))
    assert found.method == reference and list(found.pairs) == [name for name in methods if name != reference]
    assert all((one.first, one.second) == (name, reference) for name, one in found.pairs.items())


def test_a_verdict_is_told_and_marked_from_both_sides(tmp_path: Path) -> None:
    """RandLoRA is better than both; LoRA and VeRA do not differ, although VeRA's mean is higher by noise."""
    more = better_by(dict.fromkeys(DATASETS, 2.0))
    lines, table = told(swept(tmp_path, more, methods=THREE, tuned=provenance(THREE)))
    assert lines[0] == f"{B32}: RandLoRA-6 is better than LoRA-32, VeRA-256."
    assert lines[1] == "A difference was found in 2 of the 3 pairs of methods that could be tested (adjusted p < 0.05)."
    better, same = row_of(table, "RandLoRA-6"), row_of(table, "VeRA-256")
    assert (better["Verdict"].text, better["Verdict"].below, better["Verdict"].best) == ("better", "p = 0.047", True)
    assert (same["Verdict"].text, same["Verdict"].below, same["Verdict"].best) == (
        "no difference found",
        "p = 1",
        False,
    )
    assert [cell.best for row in table.rows for cell in row].count(True) == 1
    assert (better["a 1-shot"].text, better["a 1-shot"].below) == ("+2.0", "± 0.0")
    assert better["a 1-shot"].tint == pytest.approx(0.5) and same["a 1-shot"].tint == 0
    assert better["Mean difference"].text == "+2.00 ± 0.00"


def test_a_method_that_is_worse_than_the_reference_is_not_marked(tmp_path: Path) -> None:
    sweep = swept(tmp_path, better_by(dict.fromkeys(DATASETS, -2.0)))
    lines, table = told(sweep)
    assert lines[0] == f"{B32}: LoRA-32 is better than RandLoRA-6."
    verdict = row_of(table, "RandLoRA-6")["Verdict"]
    assert (verdict.text, verdict.below, verdict.best) == ("worse", "p = 0.016", False)
    (pair,) = versus_table(comparisons(sweep)).rows
    assert pair[3].text == "LoRA-32 is better" and pair[3].best


def test_no_difference_is_a_conclusion_too(tmp_path: Path) -> None:
    lines, table = told(swept(tmp_path, better_by({name: (-1.0) ** n for n, name in enumerate(DATASETS)})))
    assert lines[0] == "No difference was found in the 1 pair of methods that could be tested."
    assert row_of(table, "RandLoRA-6")["Verdict"].text == "no difference found"


@pytest.mark.parametrize(
    ("changes", "why", "shown"),
    [
        ({"seeds": [1, 2, 3]}, "3 seeds, 5 are needed", "no verdict"),
        ({"datasets": DATASETS[:2]}, "2 datasets, 6 are needed", "no verdict"),
        ({"tuned": None}, "the learning rates are not tuned", "not tuned"),
    ],
)
def test_without_a_verdict_nothing_is_called_more_accurate(
    tmp_path: Path, changes: dict[str, object], why: str, shown: str
) -> None:
    lines, table = told(swept(tmp_path, better_by(dict.fromkeys(DATASETS, 9.0)), **changes))
    assert lines[0] == "This sweep cannot show which method is more accurate."
    assert lines[1].startswith(f"No verdict for 1 of 1 pair of methods: {why}")
    verdict = row_of(table, "RandLoRA-6")["Verdict"]
    assert verdict.text == shown and why.partition(",")[0].split()[0] in verdict.title + why
    assert not any(cell.best for row in table.rows for cell in row)


@pytest.mark.parametrize("gone", ["VeRA-256", "RandLoRA-6"])
def test_planned_pairs_without_common_runs_are_named(tmp_path: Path, gone: str) -> None:
    """One of two pairs has runs, or none has: then no sentence is about the pair that was not planned."""
    pairs = [["RandLoRA-6", "LoRA-32"], ["VeRA-256", "RandLoRA-6"]]
    content = {"methods": THREE, "tuned": provenance(THREE), "pairs": pairs, "paper": None, "budgets": [1]}
    content |= {"models": {B32: MODELS[B32]}, "datasets": DATASETS, "seeds": [1, 2, 3, 4, 5]}
    more = better_by(dict.fromkeys(DATASETS, 2.0))
    folder = write_sweep(tmp_path, description(**content), keep=lambda labels: labels["method"] != gone, more=more)
    sweep = read_sweep(folder)
    found = comparisons(sweep)
    lines = conclusion(sweep, found, references(sweep, found))
    without = [
        f"No verdict for {first} against {second} on {B32}: they have no finished training runs in common."
        for first, second in pairs
        if gone in (first, second)
    ]
    if gone == "RandLoRA-6":
        assert lines == ["This sweep cannot show which method is more accurate.", *without] and len(without) == 2
    else:
        assert lines[0] == f"{B32}: RandLoRA-6 is better than LoRA-32." and lines[2:-1] == without
        assert "in 1 of the 1 pair of methods that could be tested, of 2 planned" in lines[1] and len(without) == 1
        assert lines[-1].startswith(f"{B32}: RandLoRA-6 against LoRA-32, ")


def test_cells_are_differences_seed_by_seed(sweep: Sweep) -> None:
    found = references(sweep, comparisons(sweep))
    assert [(one.model, one.method) for one in found] == [(B32, "LoRA-32"), ("CLIP-ViT-L/14", "LoRA-32")]
    table = matrix_table(sweep, found[0])
    ours, theirs = (sweep.by_seed(Key(B32, "cars", "4-shot", name)) for name in ("NoLA", "LoRA-32"))
    mean = sum(ours[seed] - theirs[seed] for seed in (1, 2, 3)) / 3
    cell = row_of(table, "NoLA")["cars mean over budgets"]  # 20 columns would be too many
    assert f"4-shot: {mean:+.2f} ± " in cell.title and "over 3 seeds" in cell.title
    assert cell.text == f"{cell.sort:+.1f}" and len(table.header) == 4 + 5


def test_a_cell_without_a_pair_says_why(tmp_path: Path) -> None:
    content = description(models={B32: {}}, datasets=["cars", "dtd"], budgets=[1, 4])
    gone = {"method": "NoLA", "dataset": "cars", "budget": "1-shot"}
    fails = lambda labels: "out of memory" if gone.items() <= labels.items() else None  # noqa: E731
    table = told(read_sweep(write_sweep(tmp_path, content, fail=fails)))[1]
    cell = row_of(table, "NoLA")["cars 1-shot"]
    assert (cell.text, cell.missing, cell.sort, cell.title) == ("-", True, None, "failed: out of memory")
