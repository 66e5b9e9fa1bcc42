"""Whole runs: what `fit` measured is what its files give, two processes, and an early end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from randlora_pl.adapters import read_adapter
from randlora_pl.interop.onnx import load_program
from randlora_pl.utils.run_files import read_results
from tests.data.conftest import Tree
from tests.data.conftest import tree as tree  # the fixture
from tests.run.test_stages import only_run
from tests.support.cli import SMALL, Refused, Run
from tests.support.products import marked


@pytest.mark.parametrize(
    ("name", "size", "method"),
    [
        ("test_resnet", "32", "FullFineTuning"),
        pytest.param("test_efficientnet", "32", "BitFit", marks=pytest.mark.full),
        pytest.param("resnet18", "64", "BitFit", marks=pytest.mark.slow),
        pytest.param("swiftformer_xs", "64", "FullFineTuning", marks=pytest.mark.slow),
    ],
)
def test_a_saved_model_gives_the_figures_of_its_run(
    name: str, size: str, method: str, run: Run, tmp_path: Path
) -> None:
    fit = run(
        *("fit", "--model", "LinearHeadTask", "--model.name", name, "--model.pretrained", "random"),
        *("--model.adapter", method, "--model.img_size", size, "--model.learning_rate", "1e-3", "--run.name", "bn"),
        *("--data.dataset", "digits", "--data.batch_size", "32", "--data.steps", "4", "--data.flip", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--data.eval_batch_size", "32", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
    )
    assert fit.code == 0, fit.err
    (folder,) = (tmp_path / "runs/bn").glob("2*")
    assert run("test", "--run", str(folder)).code == 0
    (again,) = (tmp_path / "runs/bn-test").glob("2*")
    before, after = read_results(folder), read_results(again)
    assert [before[key] for key in ("test/acc", "test/loss")] == [after[key] for key in ("test/acc", "test/loss")]

    file = read_adapter(folder / "adapter")
    kept = {key: file.tensors[key] for key in file.kept if file.tensors[key].is_floating_point()}
    assert kept
    info = run("adapter", "info", str(folder / "adapter"))
    assert "kept without a gradient" in info.out
    assert run("adapter", "merge", str(folder / "adapter"), "--output", "m.safetensors").code == 0
    merged = load_file("m.safetensors")
    program = load_program(folder / "adapter").module.state_dict()
    for key, value in kept.items():
        assert torch.equal(merged[key], value)
        assert torch.equal(program[f"encoder.tower.{key}"], value)


FIT = (
    *(sys.executable, "-m", "randlora_pl", "fit", "--config", "quickstart", "--trainer.accelerator", "cpu"),
    *("--trainer.devices", "2", "--data.steps", "2", "--data.batch_size", "4", "--data.eval_batch_size", "8"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind",), marked(zip(["digits", "folder"]), lambda row: row[0] in ("folder",)))
def test_a_fit_in_two_processes_ends_and_leaves_nothing_behind(tree: Tree, tmp_path: Path, kind: str) -> None:
    words = ["--trainer.limit_test_batches", "2"]
    if kind == "folder":  # its decoded images are shared
        words += ["--data.dataset", "folder", "--data.root", str(tree(cat=16, dog=16)), "--data.num_workers", "1"]
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    own = {"OMP_NUM_THREADS": "1", "RANDLORA_PL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*FIT, *words], cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.glob("runs/quickstart/2*/results.json")
    assert json.loads(results.read_text())["finished"]
    left = {path for path in (set(shared.iterdir()) if shared.is_dir() else set()) - before if "randlora" in path.name}
    assert not left


ENDS = ["--checkpoint.patience", "2", "--checkpoint.monitor", "val/loss", "--checkpoint.mode", "max"]


@pytest.mark.slow
@pytest.mark.usefixtures("deep")
def test_a_run_ends_early_and_its_best_adapter_is_tested(run: Run, tmp_path: Path) -> None:
    shown = run("fit", *SMALL, *ENDS, "--data.steps", "12")
    assert shown.code == 0, shown.err
    folder = only_run(tmp_path)
    results = json.loads((folder / "results.json").read_text())
    assert (results["steps"], results["best/step"], results["tested"]) == (8, 4, "adapter-best")
    assert results["finished"] and "val/loss" in results["stopped_early"]
    assert "validation     6 times on 32 of 143 images" in shown.out
    assert "at step 8 of 12: val/loss" in shown.out and "(adapter-best, step 4)" in shown.out.replace("\n", " ")
    assert run("test", "--run", str(folder), "--run.root", "runs").code == 0
    tested = json.loads((only_run(tmp_path, "quickstart-test") / "results.json").read_text())
    assert tested["test/loss"] == results["test/loss"]


def test_patience_without_validations_is_refused(refused: Refused) -> None:
    assert "patience" in refused("fit", *SMALL, *ENDS, "--trainer.limit_val_batches", "0")
