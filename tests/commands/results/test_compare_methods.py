"""``compare-methods``: a sweep, and its table."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import Run
from tests.sweep.grids import GRID, written

PROBE = {"config": "linear_probe", "head_learning_rate": 1e-2}
METHODS = {"probe": PROBE, "RandLoRA-6": {"adapter": "RandLoRA", "rank": 6}}
Refused = Callable[..., str]


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


@pytest.mark.slow
def test_search_then_comparison(run: Run, tmp_path: Path) -> None:
    tune = {"search": {"learning_rate": [1e-2, 1e-1]}, "seeds": [0]}
    written(tmp_path, methods={"probe": PROBE}, tune=tune)
    done = run("compare-methods", "--config", "small.yaml", "--tune")
    assert done.code == 0 and "| validation | " in done.out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: tiny}\ndata: {dataset: digits}\nmethods: {a: {method: LoRA}}\n", "Did you mean 'models'"),
        ("methods: 5\n", "models is missing"),
        (None, "Unknown config"),
    ],
)
def test_what_is_no_sweep_is_refused(refused: Refused, tmp_path: Path, text: str | None, said: str) -> None:
    if text:
        (tmp_path / "bad.yaml").write_text(text)
    assert said in refused("compare-methods", "--config", "bad.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "RandLoRA"], "Did you mean 'RandLoRA-6'"),
        (["--seeds", "x"], "invalid int"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "1", "--tune"], "--seeds"),
        (["--lists"], "unrecognized"),
    ],
)
def test_bad_words_are_refused(refused: Refused, words: list[str], said: str) -> None:
    text = refused("compare-methods", *words)
    assert said in text and "sweep --help" not in text


def test_a_root_that_no_dataset_reads_is_refused(refused: Refused) -> None:
    message = refused("compare-methods", "--data.root", "own")
    assert "--data.root own is not read" in message and "(digits)" in message and "your_own_data.md" in message
