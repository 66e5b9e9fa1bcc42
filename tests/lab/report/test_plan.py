from pathlib import Path
from typing import Any

import pytest
import yaml

from randlora_pl.data.catalog import PAPER
from randlora_pl.lab.report.cells import Key, budget_order, read_plan
from randlora_pl.utils.errors import UserError
from tests.lab.report.sweeps import description


def plan_of(folder: Path, content: Any) -> Any:
    (folder / "sweep.yaml").write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    )
    return read_plan(folder)


def test_cells_are_the_product(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, description())
    assert plan.budgets == ["1-shot", "4-shot", "16-shot", "100%"]
    assert len(list(plan.cells())) == 2 * 5 * 4 * 6
    assert plan.paper_name("full fine-tuning") == "FT"
    assert plan.paper_name("RandLoRA-6", "CLIP-ViT-L/14") == "RandLoRA10"
    assert plan.paper_name("RandLoRA-6", "CLIP-ViT-B/32") == "RandLoRA-6"


def test_the_untrained_model_has_one_cell_for_each_data_set(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, description(methods={"zero-shot": {}, "LoRA": {"adapter": "LoRA"}}))
    cells = list(plan.cells())
    assert len(cells) == 2 * 5 * (4 + 1)
    assert {cell.budget for cell in cells if cell.method == "zero-shot"} == {"zero-shot"}
    assert "zero-shot" not in {cell.budget for cell in cells if cell.method == "LoRA"}


def test_a_method_for_some_models(tmp_path: Path) -> None:
    methods = {"A": {"adapter": "LoRA", "models": ["CLIP-ViT-B/32"]}, "B": {"adapter": "LoRA"}}
    cells = list(plan_of(tmp_path, description(methods=methods)).cells())
    assert {cell.model for cell in cells if cell.method == "A"} == {"CLIP-ViT-B/32"}
    assert {cell.model for cell in cells if cell.method == "B"} == {"CLIP-ViT-B/32", "CLIP-ViT-L/14"}


@pytest.mark.parametrize(
    ("paper", "tables", "figure"),
    [
        ({"table": 11}, ["11"], None),
        (11, ["11"], None),
        ({"tables": [11, 12]}, ["11", "12"], None),
        ({"figure": 3}, ["11", "12", "13"], "3"),
        ({"figure": 2}, ["14"], "2"),
        (None, [], None),
    ],
)
def test_tables_of_the_paper(tmp_path: Path, paper: Any, tables: list[str], figure: str | None) -> None:
    plan = plan_of(tmp_path, description(paper=paper))
    assert (plan.tables, plan.figure) == (tables, figure)


def test_data_sets(tmp_path: Path) -> None:
    assert list(plan_of(tmp_path, description(datasets="all")).datasets) == list(PAPER)
    plan = plan_of(
        tmp_path, description(datasets={"pets": {"dataset": "oxfordpets"}, "few": {"dataset": "cars", "root": "x"}})
    )
    assert list(plan.datasets) == ["pets", "few"]
    assert plan.paper_name("pets") == "oxfordpets"
    assert plan.paper_name("few") == "few"  # other images: no number of the paper is beside it


def test_the_order_of_budgets() -> None:
    shuffled = ["100%", "16-shot", "other", "1-shot", "zero-shot", "50%", "2-shot"]
    assert sorted(shuffled, key=budget_order) == ["zero-shot", "1-shot", "2-shot", "16-shot", "50%", "100%", "other"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "cut off or damaged"), ("- 1", "does not describe a sweep"), ("models: x", "does not describe a sweep")],
)
def test_damage_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=f"sweep.yaml .*{message}"):
        plan_of(tmp_path, content)


def test_key_is_a_cell() -> None:
    assert Key("m", "d", "b", "x")._fields == ("model", "dataset", "budget", "method")
