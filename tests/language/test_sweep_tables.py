"""The shipped sweeps of language models: their cells, scalings and counts, and a tiny one of GLUE."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from randlora_pl.adapters import VeRA, inject
from randlora_pl.commands.sweep_job import find_sweep
from randlora_pl.lab.paper import cells as paper_cells
from randlora_pl.lab.paper import notes
from randlora_pl.run.options.shipped import find_config
from randlora_pl.sweep.expand import counts
from randlora_pl.sweep.plan import plan
from tests.support.cli import Refused, Run

from . import classify
from .files import write_glue


def test_tables_1_and_6_are_made_of_cells_of_table_15() -> None:
    hashes = {name: {c.hash for c in plan(find_sweep(name)[1])} for name in ("table1", "table6", "table15")}
    assert hashes["table1"] < hashes["table15"]
    assert len(hashes["table6"] - hashes["table15"]) == 12, "DoRA is in Table 6 only"


ALPHAS = {"commonsense_qwen2": (128, 896), "commonsense_phi3": (3072, 3072), "commonsense_llama3": (1024, 4096)}


@pytest.mark.parametrize("name", ["table1", "table3_llama", "table6", "table10_llama", "table15"])
def test_alphas_are_those_of_the_rank(name: str) -> None:
    """Scaling 2 / sqrt(n) for RandLoRA and NoLA, 2 for LoRA and VeRA (Table 9), whatever the rank."""
    _, description = find_sweep(name)
    for cell in plan(description):
        flat = cell.flat
        if cell.untrained:
            continue
        kind = "model.adapter.inner" if flat["model.adapter"] == "DoRA" else "model.adapter"
        rank, alpha = flat.get(f"{kind}.rank", 1), flat[f"{kind}.alpha"]
        assert flat["model.learning_rate"] == 1e-4
        if flat[kind] == "RandLoRA":
            sides = ALPHAS[str(description.models[cell.labels.model]["config"])]
            wanted = [2 * rank / (-(-side // rank)) ** 0.5 for side in sides]
            alphas = list(alpha.values()) if isinstance(alpha, dict) else [alpha] * 2
            assert alphas == pytest.approx(wanted, abs=1e-3), cell.labels
            assert flat["model.adapter.dropout"] == 0.05 and flat["model.adapter.init"] == "lambda"
        else:
            assert alpha / rank == (0.0625 if flat[kind] == "NoLA" else 2), cell.labels


def parameters_of(number: int, *labels: str) -> str:
    """The printed parameters of a model, method and budget."""
    return next(cell.params for cell in paper_cells(number) if cell[1:4] == labels)


@pytest.mark.slow
def test_table_15_trains_as_many_parameters_as_it_says() -> None:
    """The printed share of all parameters, counted on the meta device."""
    _, description = find_sweep("table15")
    for cell in plan(description):
        labels = cell.labels
        if labels.model == "LLama3" or labels.seed > 1 or labels.budget != "15k" or "VeRA" in labels.method:
            continue  # VeRA's printed share of Phi3 fits no choice of its weights, see notes.yaml
        found = counts(cell.tree)
        method = labels.method.removesuffix(" of Phi3")
        printed = float(parameters_of(15, labels.model, method, "15k"))
        assert found is not None and 100 * found.trainable / found.total == pytest.approx(printed, rel=0.15), labels


@pytest.mark.slow
def test_the_notes_about_vera_are_true() -> None:
    """Its parameters on RoBERTa, and how far the scaling of 2 lets a step go."""
    told = {note.key: note.text for note in notes()}
    text = told["vera_of_roberta"]
    cells = {cell.labels.model: cell for cell in plan(find_sweep("table4")[1]) if "VeRA" in cell.labels.method}
    for model, method in (("RoBERTa-base", "VeRA-1024"), ("RoBERTa-large", "VeRA-256")):
        found = counts(cells[model].tree)
        assert found is not None and f"{found.trainable:,}" in text and model in text and method in text
        assert parameters_of(4, model, method, "100%") == "0.26M"
    cell = next(c for c in plan(find_sweep("table15")[1]) if "VeRA" in c.labels.method)
    rank, alpha = (cell.flat[f"model.adapter.{name}"] for name in ("rank", "alpha"))
    assert (rank, alpha / rank, alpha) == (1024, 2, 2048) and "2,048 times" in told["vera_scaling_of_language_models"]
    layer = torch.nn.Sequential(torch.nn.Linear(256, 256))
    inject(layer, VeRA(rank=rank, alpha=alpha), ["0"])
    delta = layer[0].delta
    delta.b.data += cell.flat["model.learning_rate"]  # AdamW's first step goes this far
    assert float(delta.change(torch.empty(0)).std()) == pytest.approx(6e-4, rel=0.1)
    assert "6e-4" in told["vera_scaling_of_language_models"]


def test_reports_have_the_notes_about_vera() -> None:
    for number, model, keys in (
        (4, "RoBERTa-base", {"vera_of_roberta"}),
        (4, "RoBERTa-large", set()),
        (15, "Qwen2", {"vera_of_language_models", "vera_scaling_of_language_models"}),
    ):
        cell = next(c for c in paper_cells(number) if c.model == model and c.method.startswith("VeRA"))
        assert {note.key for note in notes() if note.touches(cell) and note.key.startswith("vera_")} == keys


GLUE: dict[str, Any] = {
    "paper": {"table": 4},
    "models": {
        "RoBERTa-base": {
            "config": "glue_roberta_base",
            "set": {"model.pretrained": "random", "model.config_overrides": classify.SHAPE},
        }
    },
    "datasets": ["cola", "stsb"],
    "budgets": ["100%"],
    "methods": {"RandLoRA-64": {"adapter": "RandLoRA", "rank": 8}},
    "seeds": [1, 2],
    "set": {"trainer.precision": "32-true", "trainer.accelerator": "cpu", "run.logger": "none", "data.epochs": 1},
}


@pytest.mark.slow
def test_a_tiny_sweep_of_glue_counts_its_own_metrics(run: Run, refused: Refused, tmp_path: Path) -> None:
    root = write_glue(tmp_path / "glue")
    (tmp_path / "glue.yaml").write_text(yaml.safe_dump(GLUE))
    swept = run("sweep", "glue.yaml", "--data.root", str(root))
    assert swept.code == 0 and "4 of 4 cells are done" in swept.out, swept.out + swept.err
    assert run("report", "runs/sweeps/glue").code == 0
    text = next(tmp_path.rglob("report.md")).read_text()
    assert "paper 59.4 ± 2.1" in text and "paper 90.3 ± 0.2" in text and "combined score" in text
    rows = list(csv.DictReader(next(tmp_path.rglob("cells.csv")).open()))
    for row in rows:
        results = json.loads((tmp_path / "runs/sweeps/glue/cells" / row["cell"] / "results.json").read_text())
        assert float(row["accuracy"]) == pytest.approx(
            100 * results["test/matthews" if row["dataset"] == "cola" else "test/pearson"], abs=1e-3
        )
    (tmp_path / "zero.yaml").write_text(yaml.safe_dump(GLUE | {"methods": GLUE["methods"] | {"zero-shot": None}}))
    assert "zero-shot" in refused("sweep", "zero.yaml", "--data.root", str(root))


@pytest.mark.slow
def test_table_4_trains_as_many_parameters_as_its_configs_say() -> None:
    """Beside the head, which all methods train; counted on the meta device."""
    told = {("RoBERTa-base", "RandLoRA-64"): 718_848, ("RoBERTa-base", "LoRA-4"): 663_552}
    told |= {("RoBERTa-large", "RandLoRA-100"): 1_780_416, ("RoBERTa-large", "LoRA-4"): 1_769_472}
    cells = {cell.labels[::3]: cell for cell in plan(find_sweep("table4")[1])}
    for place, number in told.items():
        found = counts(cells[place].tree)
        assert found is not None and found.trainable == number, place
        assert f"{number:,}" in find_config(str(place[0]).replace("RoBERTa-", "glue_roberta_")).read_text()
    rates = {cell.labels.method: cell.flat.get("model.learning_rate") for cell in cells.values()}
    assert rates["VeRA-1024"] == rates["VeRA-256"] == 1e-2 and rates["LoRA-4"] is None, "1e-4 by default"
