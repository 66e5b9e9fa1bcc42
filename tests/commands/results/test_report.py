from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.report.sweeps import METHODS, description, write_sweep
from tests.support.cli import Run
from tests.support.products import in_one_item

SMALL = description(
    models={"CLIP-ViT-B/32": {}},
    datasets=["cars", "dtd"],
    budgets=[1, "100%"],
    methods={name: METHODS[name] for name in ("LoRA-32", "RandLoRA-6")},
)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", SMALL, fail=lambda labels: "broken" if labels["seed"] == 3 else None)


def test_report(run: Run, sweep: Path) -> None:
    result = run("report", "sweep")
    assert result.code == 0 and not result.err
    assert result.out.startswith("18 of 26 runs are finished, 8 failed\n")
    for line in result.out.splitlines()[1:-1]:
        name, _, size = line.partition(": ")
        assert Path(name).stat().st_size == int(size.removesuffix(" bytes").replace(",", ""))
    assert result.out.endswith("Next: open sweep/report/index.html in a browser\n")
    again = run("report", "sweep")
    assert again.code == 2 and "sweep/report" in again.err and "--overwrite" in again.err
    assert run("report", "sweep", "--overwrite").code == 0
    assert run("report", "sweep", "--output", "elsewhere/deep").code == 0
    assert Path("elsewhere/deep/index.html").read_bytes() == Path("sweep/report/index.html").read_bytes()


def test_damage_is_told_and_the_rest_goes_on(run: Run, sweep: Path) -> None:
    cell = next(path for path in sorted((sweep / "cells").iterdir()) if (path / "results.json").exists())
    (cell / "results.json").write_text("{")
    result = run("report", "sweep")
    assert result.code == 0 and "17 of 26 runs are finished" in result.out and "1 damaged" in result.out
    assert result.err.startswith(f"randlora-pl: warning: cells/{cell.name}/results.json is cut off or damaged")
    assert f"cells/{cell.name}/results.json is cut off" in Path("sweep/report/index.html").read_text()


@in_one_item(
    ("words", "message"),
    [
        (["none"], "none does not exist. A sweep is a folder such as runs/sweeps/NAME"),
        (["."], "Did you mean sweep?"),
        (["sweep/cells"], "sweep/cells is not a sweep"),
        (["sweep", "--ouput", "x"], "Did you mean '--output'"),
        (["sweep", "--output", "sweep/sweep.yaml"], "sweep/sweep.yaml is a file; give a folder"),
        (["sweep", "--output", "sweep"], "sweep exists and is not empty"),
    ],
)
def test_mistakes(refused: Callable[..., str], sweep: Path, words: list[str], message: str) -> None:
    assert message in refused("report", *words)


def test_nothing_finished(refused: Callable[..., str], tmp_path: Path) -> None:
    write_sweep(tmp_path / "failed", SMALL, fail=lambda labels: "out of memory", zeroshot=False)
    message = refused("report", "failed")
    assert "24" in message
    assert "failure" in message
