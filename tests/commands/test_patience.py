import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.run.test_stages import only_run
from tests.support.cli import SMALL, Run

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


def test_patience_without_validations_is_refused(refused: Callable[..., str]) -> None:
    assert "patience" in refused("fit", *SMALL, *ENDS, "--trainer.limit_val_batches", "0")
    assert "patience" in refused("fit", *SMALL, "--checkpoint.patience", "0")
