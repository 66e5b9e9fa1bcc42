"""Sweeps of language models: cells, estimates, a whole tiny one, a search of learning rates, the shipped tables."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from randlora_pl.commands.data import absent
from randlora_pl.commands.sweep_job import find_sweep
from randlora_pl.lab.paper import cells as paper_cells
from randlora_pl.lab.paper import notes
from randlora_pl.language import catalog as known
from randlora_pl.language.prompt_sets import SOURCE, TREE
from randlora_pl.run.options.classes import classes, takes_texts
from randlora_pl.sweep import SweepConfig, budget
from randlora_pl.sweep.expand import counts
from randlora_pl.sweep.plan import Cell, is_text, plan
from randlora_pl.utils.errors import UserError
from tests.support.cli import Refused, Run
from tests.support.products import marked

from . import classify
from .files import write_commonsense, write_glue
from .small import SHAPES, make

GRID: dict[str, Any] = {
    "paper": {"table": 15},
    "models": {
        "Qwen2": {
            "config": "commonsense_qwen2",
            "set": {
                "model.pretrained": "random", "model.config_overrides": SHAPES["qwen2"] | {"vocab_size": 260},
                "model.num_beams": 1, "model.max_new_tokens": 2,
            },
        }
    },
    "datasets": ["commonsense"],
    "budgets": ["15k", "170k"],
    "methods": {
        "zero-shot": None,
        "LoRA-16": {"adapter": "LoRA", "rank": 4, "alpha": 8},
        "RandLoRA-10": {"adapter": "RandLoRA", "rank": 8},
    },
    "seeds": [1],
    "set": {
        "trainer.precision": "32-true", "trainer.accelerator": "cpu", "run.logger": "none", "checkpoint.test": "best",
        "data.steps": 2, "data.batch_size": 2, "data.validation": 4, "data.tests": ["boolq", "piqa"],
        "data.cutoff": 64, "trainer.val_check_interval": 1, "trainer.limit_test_batches": 2,
    },
}  # fmt: skip
"""Tiny random Qwen2 on files of the true format; texts are cut to 64 bytes."""


def cells_of(**changes: Any) -> list[Cell]:
    return plan(SweepConfig.from_content(GRID | changes))


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "words.yaml"
    file.write_text(yaml.safe_dump(GRID | changes, sort_keys=False))
    return file


# Cells


def test_a_size_is_a_budget_and_the_end_of_the_name_of_the_data() -> None:
    cells = {cell.labels[1:4]: cell for cell in cells_of()}
    names = {labels: cell.flat["data.dataset"] for labels, cell in cells.items()}
    assert names == {
        ("commonsense", "zero-shot", "zero-shot"): "commonsense_15k",
        ("commonsense", "15k", "LoRA-16"): "commonsense_15k",
        ("commonsense", "15k", "RandLoRA-10"): "commonsense_15k",
        ("commonsense", "170k", "LoRA-16"): "commonsense_170k",
        ("commonsense", "170k", "RandLoRA-10"): "commonsense_170k",
    }
    untrained = cells["commonsense", "zero-shot", "zero-shot"].flat
    assert untrained["model.adapter"] == "LoRA" and untrained["model.adapter.rank"] == 1
    assert "model.adapter.dropout" not in untrained, "nothing of the config's RandLoRA"
    assert not any("data.shots" in cell.flat or "data.fraction" in cell.flat for cell in cells.values())
    (whole, *_) = cells_of(datasets=["commonsense_170k"], budgets=["100%"], methods={"x": {"adapter": "LoRA"}})
    assert whole.flat["data.dataset"] == "commonsense_170k"


def test_sizes_are_written_like_15k() -> None:
    assert budget("15k") == "15k" and budget("170k") == "170k" and budget(15) == "15-shot"
    for wrong in ("k", "0k", "1.5k", "15K shots"):
        with pytest.raises(UserError, match="15k"):
            budget(wrong)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budgets": [4], "datasets": ["commonsense_15k"]}, "Unknown option --data.shots"),
        ({"budgets": ["100%"]}, "'commonsense' is unknown. Did you mean 'commonsense_15k'"),
        ({"budgets": ["15k", "50%"]}, "Unknown option --data.fraction"),
        ({"budgets": ["30k"]}, "'commonsense_30k' is unknown"),
        ({"datasets": ["cars"]}, "'cars' is unknown.*Known to a language task"),
    ],
)
def test_budgets_that_texts_do_not_have_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cells_of(**changes)


def test_own_texts_are_known_by_their_place() -> None:
    changes = {"budgets": ["100%"], "methods": {"x": {"adapter": "LoRA"}}}
    options = {key: value for key, value in GRID["set"].items() if key != "data.tests"}
    one, other = (
        cells_of(datasets={"own": {"dataset": "jsonl", "root": root}}, set=options, **changes)[0] for root in "ab"
    )
    assert one.hash != other.hash
    roots = ({"data.root": root} for root in "ab")
    same = {cells_of(set=GRID["set"] | place, **changes | {"budgets": ["15k"]})[0].hash for place in roots}
    assert len(same) == 1, "files of the same name are the same everywhere"


def test_the_language_tasks_are_known_without_importing_them() -> None:
    assert set(known.TASKS) == {name for name, kind in classes("model").items() if takes_texts(kind)}
    assert all(is_text(cell.tree) for cell in cells_of())


# Counts


def test_counts_are_those_of_the_model() -> None:
    cell = next(cell for cell in cells_of() if cell.labels.method == "LoRA-16")
    found = counts(cell.tree)
    task = make("bytes", overrides={"vocab_size": 260, "tie_word_embeddings": True})  # as that of the Hub
    task.adapt()
    frozen = sum(p.numel() for p in task.model.parameters() if not p.requires_grad)
    assert found is not None and found.total - found.trainable == frozen
    # rank 4 at q, k, v, up and down: 64 -> 64, 32, 32, 128 and 128 -> 64, twice
    assert found.trainable == 2 * 4 * ((64 + 64) + 2 * (64 + 32) + 2 * (64 + 128))


def test_what_only_the_network_knows_is_not_counted() -> None:
    assert make("bytes", name="somebody/some-model", pretrained=None, overrides={}).on_meta() is None


# What is there


def test_the_source_of_missing_texts_is_told_once(refused: Refused, tmp_path: Path) -> None:
    shown = refused("sweep", "table4", "--data.root", str(tmp_path), "--only", "model=RoBERTa-base")
    assert f"{tmp_path / 'SST-2'} does not exist; {tmp_path / 'MRPC'} does not exist (4 more like these). " in shown
    assert shown.count("gluebenchmark.com") == 1 and ".." not in shown


def test_a_dry_run_says_where_missing_texts_are_from(run: Run, tmp_path: Path) -> None:
    written(tmp_path)
    dry = run("sweep", "words.yaml", "--data.root", "none", "--dry-run", "--only", "budget=15k")
    said = dry.out.partition("Not on this machine: commonsense. Get them:\n  none does not exist. ")[2]
    assert dry.code == 0 and said == f"Expected under --data.root: {TREE}. Get the files: {SOURCE}\n"


def test_missing_texts_are_told_by_their_files(tmp_path: Path) -> None:
    assert "commonsense_15k.json" in str(absent("commonsense_15k", tmp_path))
    root = write_commonsense(tmp_path / "questions")
    assert absent("commonsense_15k", root) == absent("commonsense_170k", root) is None
    assert absent("commonsense_15k", write_commonsense(tmp_path / "nested", nested=True)) is None
    (root / "commonsense_15k.json").unlink()
    assert absent("commonsense_15k", root, trains=False) is None and absent("commonsense_15k", root)
    shutil.rmtree(root / "piqa")
    assert "piqa" in str(absent("commonsense_170k", root)) and absent("commonsense_170k", root, ["boolq"]) is None
    glue = write_glue(tmp_path / "glue")
    assert absent("rte", glue) is None and "RTE does not exist" in str(absent("rte", tmp_path))
    (glue / "RTE" / "train.tsv").unlink()
    assert absent("rte", glue, trains=False) is None
    lacking = absent("rte", glue)
    assert lacking is not None and lacking.hint.startswith("Get the files: https://glue")
    assert lacking.what == f"{glue / 'RTE' / 'train.tsv'} does not exist"
    assert "train.jsonl" in str(absent("jsonl", tmp_path)) and "train.txt" in str(absent("e2e", tmp_path))
    (tmp_path / "mine.csv").write_text("text,label\na,b\n")
    assert absent("csv", tmp_path / "mine.csv") is None


# A whole one


def test_a_tiny_sweep_from_the_command_line_to_its_report(run: Run, refused: Refused, tmp_path: Path) -> None:
    written(tmp_path)
    assert "commonsense_15k.json" in refused("sweep", "words.yaml", "--data.root", "none")
    root = write_commonsense(tmp_path / "data", 3)
    words = ("sweep", "words.yaml", "--data.root", str(root))
    dry = run(*words, "--dry-run")
    assert dry.code == 0 and "5 cells: 5 open" in dry.out
    words += ("--only", "budget=15k,zero-shot", "method=zero-shot,LoRA-16")
    first = run(*words)
    assert first.code == 0, first.err + first.out
    again = run(*words)
    assert "2 of 2 cells are done" in again.out and ": accuracy" not in again.out, "nothing is done twice"
    sweep = tmp_path / "runs/sweeps/words"
    for place in (sweep / "cells").iterdir():
        labels = json.loads((place / "cell.json").read_text())
        results = json.loads((place / "results.json").read_text())
        own = [results[f"test/acc/{name}"] for name in ("boolq", "piqa")]
        assert results["finished"] and results["test/acc"] == pytest.approx(sum(own) / 2)
        if labels["method"] == "zero-shot":
            assert results["trainable_parameters"] == 0 and "val/loss" not in results
        else:
            assert results["steps"] == 2 and results["best/step"] in (1, 2) and results["data/train"] == 20
    reported = run("report", str(sweep))
    assert reported.code == 0, reported.err
    text = next(tmp_path.rglob("report.md")).read_text()
    assert "BoolQ" in text and "PIQA" in text and "HellaSwag" not in text
    assert "paper 53.39" not in text.partition("170k")[0] and "paper" in text and "not run" in text


def test_tables_1_and_6_are_made_of_cells_of_table_15() -> None:
    hashes = {name: {c.hash for c in plan(find_sweep(name)[1])} for name in ("table1", "table6", "table15")}
    assert hashes["table1"] < hashes["table15"]
    assert len(hashes["table6"] - hashes["table15"]) == 12, "DoRA is in Table 6 only"


TABLES = ["table1", "table3_llama", "table6", "table10_llama", "table15"]  # the first is a part of the last
ALPHAS = {"commonsense_qwen2": (128, 896), "commonsense_phi3": (3072, 3072), "commonsense_llama3": (1024, 4096)}


@pytest.mark.parametrize(("name",), marked(zip(TABLES), lambda row: row[0] != "table1"))
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
