"""``compare-methods``: a sweep, and its table."""

from pathlib import Path

import pytest

from tests.support.cli import Refused, Run
from tests.sweep.grids import GRID, written

PROBE = {"config": "linear_probe", "head_learning_rate": 1e-2}
METHODS = {"probe": PROBE, "RandLoRA-6": {"adapter": "RandLoRA", "rank": 6}}


@pytest.mark.slow  # the README's command is run by default
def test_the_table_of_the_cells_that_were_asked_for_and_resumed(run: Run, tmp_path: Path) -> None:
    written(tmp_path, methods=METHODS)
    words = ("compare-methods", "--config", "small.yaml")
    first = run(*words, "--methods", "probe", "--seeds", "3")
    table = tmp_path / "runs/sweeps/small/table.md"
    assert first.code == 0 and first.out.count("probe, seed 3: ") == 1 and "RandLoRA-6" not in first.out
    assert "| probe | 1,280 | 0.01 | typed | " in first.out and table.read_text() in first.out
    assert "logistic regression" in first.out and "±" not in table.read_text().partition("seeds**")[2]
    whole = run(*words, "--seeds", "3", "4")
    assert whole.code == 0 and "4 of 4 cells" in whole.out and "probe, seed 3: " not in whole.out
    assert table.read_text().count("±") == 1 + 4, "in the caption, and of each method and baseline"
    again = run(*words, "--seeds", "3", "4")
    assert again.code == 0 and table.read_text() in again.out and ", seed " not in again.out
    assert "| RandLoRA-6 | " in again.out
    dry = run(*words, "--dry-run")
    assert dry.code == 0 and "2 open" in dry.out and "raw pixels" not in dry.out


def test_failed_cells_have_no_table(run: Run, tmp_path: Path) -> None:
    written(tmp_path, set=GRID["set"] | {"trainer.precision": "16-true"})
    failed = run("compare-methods", "--config", "small.yaml", "--methods", "LoRA-4")
    assert failed.code == 1 and "raw pixels" not in failed.out
    assert "Retry them: randlora-pl compare-methods --config small.yaml --methods LoRA-4 --retry-failed" in failed.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "RandLoRA"], "Did you mean 'RandLoRA-6'"),
        (["--seeds", "x"], "invalid int"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "--tune"], "--seeds"),
        (["--lists"], "unrecognized"),
        (["--data.root", "own"], "--data.root own is not read"),
        (["--config", "typo.yaml"], "Did you mean 'models'"),
        (["--config", "gone.yaml"], "Unknown config"),
    ],
)
def test_bad_words_are_refused(refused: Refused, tmp_path: Path, words: list[str], said: str) -> None:
    typo = "model: {name: tiny}\ndata: {dataset: digits}\nmethods: {a: {method: LoRA}}\n"
    (tmp_path / "typo.yaml").write_text(typo)
    text = refused("compare-methods", *words)
    assert said in text and "sweep --help" not in text
