"""The table of what methods forget."""

from pathlib import Path

import pytest

from randlora_pl.lab.report.accuracy import elsewhere_table
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import build, cells_csv
from tests.lab.report.sweeps import Labels, description, write_sweep


def test_forgetting_is_the_change_from_the_pretrained_model(tmp_path: Path) -> None:
    content = description(budgets=[16], datasets=["cars", "dtd"], seeds=[1, 2, 3])

    def measured(labels: Labels) -> dict[str, float]:
        if labels["method"] == "zero-shot":
            return {"test/elsewhere/digits": 0.5}  # the test of an untrained cell
        if labels["method"] != "LoRA-16" or labels["model"].endswith("L/14"):
            return {}
        return {"test/elsewhere/digits": 0.5 + labels["seed"] / 100 + (0.1 if labels["dataset"] == "cars" else -0.1)}

    sweep = read_sweep(write_sweep(tmp_path / "sweep", content, more=measured))
    assert elsewhere_table(sweep, "CLIP-ViT-L/14") is None
    table = elsewhere_table(sweep, "CLIP-ViT-B/32")
    assert table is not None
    ((name, cell),) = (line for line in table.rows if not line[1].missing)
    assert name.text == "LoRA-16" and cell.text == "+2.00 ± 2.48"  # t(2) = 4.303, of 1, 2 and 3 points
    assert cell.title == "seed 1: +1.00; seed 2: +2.00; seed 3: +3.00" and cell.sort == pytest.approx(2)
    assert any(section.title == "Forgetting" and section.parts for section in build(sweep).sections)
    header, *lines = cells_csv(sweep).splitlines()
    assert "test/elsewhere/digits" in header and any("0.61" in line for line in lines)
