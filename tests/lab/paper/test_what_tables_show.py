"""Figures that pages quote of the paper's tables, and one of them counted by hand."""

from statistics import fmean
from types import ModuleType

import pytest

from randlora_pl.lab.paper import cells
from tests.support.scripts import load_script

B32, L14, H14, DINO = 11, 12, 13, 14


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("paper_tables")


def test_a_share_is_what_a_loop_over_the_cells_counts(script: ModuleType) -> None:
    value = {(cell.method, cell.column): cell.value for cell in cells(B32) if cell.budget == "16-shot"}
    columns = [column for method, column in value if method == "FT" and column != "Average"]
    gain = {column: value["RandLoRA6", column] - value["LoRA32", column] for column in columns}
    easy = [column for column in columns if value["NoLA", column] >= value["LoRA32", column]]
    one = script.gains(B32, "16-shot")
    assert one.mean("RandLoRA") == pytest.approx(fmean(gain.values()))
    assert {*one.easy.index.get_level_values("column")} == {*easy} and len(easy) == 9, "one of them is equal"
    assert one.share == pytest.approx(100 * sum(gain[column] for column in easy) / sum(gain.values()))


def test_the_figures_that_pages_quote(script: ModuleType) -> None:
    by_budget = {budget: script.gains(B32, budget) for budget in script.BUDGETS}
    shares = {budget: f"{one.share:.0f} % of {len(one.easy)}" for budget, one in by_budget.items()}
    assert shares == dict(zip(script.BUDGETS, ("12 % of 5", "52 % of 5", "84 % of 10", "74 % of 9", "16 % of 5",
                                               "15 % of 3"), strict=True))  # fmt: skip
    assert [one.below for one in by_budget.values()] == [15, 10, 10, 5, 2, 2]
    means = {method: [round(one.mean(method), 1) for one in by_budget.values()] for method in ("RandLoRA", "FT")}
    assert means == {"RandLoRA": [3.2, 2.4, 3.7, 3.3, 2.4, 2.2], "FT": [-0.8, -0.3, 1.8, 3.6, 2.4, 2.2]}
    correlations = [[round(one.correlation(m), 2) for m in script.METHODS] for one in (
        by_budget["50%"], by_budget["100%"], script.gains(B32))]  # fmt: skip
    assert correlations == [[0.97, -0.13, -0.36], [0.97, -0.6, -0.46], [0.86, 0.44, -0.44]]
    whole = [script.gains(number, "100%") for number in (B32, L14, H14)]
    assert [round(one.mean("RandLoRA"), 2) for one in whole] == [2.17, 0.93, 0.62]
    large = {number: [script.gains(number, budget) for budget in script.BUDGETS] for number in (L14, H14)}
    shares = {number: sorted(round(one.share) for one in large[number]) for number in large}
    assert [(least, most) for least, *_, most in shares.values()] == [(16, 27), (16, 59)]
    assert sorted(round(one.mean("RandLoRA"), 2) for one in large[L14])[::5] == [0.90, 2.33]
    ratios = [one.mean("RandLoRA") / one.mean("FT") for one in (large[L14][0], *large[H14][:3])]
    assert all(2.8 < ratio < 4.8 for ratio in ratios), "about 3 to 5"
    few = [script.gains(DINO, budget) for budget in script.BUDGETS[:3]]
    assert all(one.mean(method) < 0 and one.share is None for one in few for method in ("RandLoRA", "FT"))
    assert script.gains(H14).below is None and script.row(few[0])[:2] == ["DINOv2-ViT-B/14", "1-shot"]
