"""The table of base and new classes, and the accuracies on other datasets."""

from pathlib import Path
from statistics import fmean

import pytest

from randlora_pl.lab.report.accuracy import (
    Beside,
    elsewhere_table,
    new_classes_table,
    transfer_table,
)
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import build, cells_csv
from tests.lab.report.sweeps import Labels, description, write_sweep

MODEL = "CLIP-ViT-B/32"
CONTENT = {"budgets": [16], "datasets": ["cars", "dtd"], "seeds": [1, 2], "methods": {"LoRA-16": {"adapter": "LoRA"}}}


def test_the_harmonic_mean_is_of_the_averages(tmp_path: Path) -> None:
    base = {("cars", 1): 0.9, ("cars", 2): 0.8, ("dtd", 1): 0.7, ("dtd", 2): 0.8}
    new = {("cars", 1): 0.6, ("cars", 2): 0.5, ("dtd", 1): 0.0, ("dtd", 2): 0.1}

    def measured(labels: Labels) -> dict[str, float]:
        if labels["model"] != MODEL:
            return {}
        if labels["method"] == "zero-shot":
            return {"test/acc": 0.6, "test/new/acc": 0.8}
        key = labels["dataset"], labels["seed"]
        return {"test/acc": base[key], "test/new/acc": new[key]}

    sweep = read_sweep(write_sweep(tmp_path / "sweep", description(**CONTENT), more=measured))
    assert new_classes_table(sweep, Beside(sweep.plan), "CLIP-ViT-L/14") is None
    table = new_classes_table(sweep, Beside(sweep.plan), MODEL)
    assert table is not None
    assert [cell.text for cell in table.header] == ["Method", "Data", "cars", "dtd", "Base", "New", "H"]
    rows = {line[0].text: line for line in table.rows}
    cars, dtd, *averages = rows["LoRA-16"][2:]
    assert (cars.text, cars.below) == ("85.0 / 55.0", "H 66.8") and dtd.text == "75.0 / 5.0"
    assert cars.title == "seed 1: 90.00 / 60.00; seed 2: 80.00 / 50.00"
    first, second, mean = (cell.sort for cell in averages)
    assert first == pytest.approx(100 * fmean(base.values())) and second == pytest.approx(100 * fmean(new.values()))
    assert mean == pytest.approx(2 * 80 * 30 / 110) and averages[2].text.startswith("43.6 ± ")
    assert [cell.text for cell in rows["zero-shot"][-3:]] == ["60.0", "80.0", "68.6"]
    assert any(section.title == "New classes" and section.parts for section in build(sweep).sections)
    header, *lines = cells_csv(sweep).splitlines()
    assert ",test/new/acc," in header and any(",0.6," in line for line in lines)


def test_accuracies_on_other_datasets(tmp_path: Path) -> None:
    names = ("dtd", "eurosat", "imagenet_v2", "imagenet_a")

    def measured(labels: Labels) -> dict[str, float]:
        if labels["model"] != MODEL:
            return {}
        found = {name: 0.1 * (number + labels["seed"]) for number, name in enumerate(names)}
        lacking = labels["method"] == "zero-shot"
        return {f"test/elsewhere/{name}": value for name, value in found.items() if not lacking or name != "dtd"}

    content = description(**CONTENT | {"datasets": ["imagenet"]})
    sweep = read_sweep(write_sweep(tmp_path / "sweep", content, more=measured))
    assert transfer_table(sweep, Beside(sweep.plan), "CLIP-ViT-L/14") is None
    table = transfer_table(sweep, Beside(sweep.plan), MODEL)
    assert table is not None
    means = ["Mean of other datasets", "Mean of shifted test sets"]
    assert {cell.text for cell in table.header[4:]} == {*names, *means}
    columns = {cell.text: number for number, cell in enumerate(table.header)}
    rows = {line[0].text: line for line in table.rows}
    tuned, pretrained = rows["LoRA-16"], rows["zero-shot"]
    assert tuned[columns["dtd"]].sort == pytest.approx(15) and tuned[columns[means[0]]].sort == pytest.approx(20)
    assert tuned[columns[means[1]]].sort == pytest.approx(40)
    assert pretrained[columns["dtd"]].missing and pretrained[columns[means[0]]].missing
    assert any(section.title == "Other datasets" for section in build(sweep).sections)
    change = elsewhere_table(sweep, MODEL)  # the test of the pretrained model is the reference
    assert change is not None and {cell.text for cell in change.header[1:]} == set(names) - {"dtd"}


def test_forgetting_is_the_change_from_the_pretrained_model(tmp_path: Path) -> None:
    content = description(**CONTENT | {"seeds": [1, 2, 3]})

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
