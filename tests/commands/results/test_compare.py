import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cli import Run


def copy(
    finished: Path, name: str, options: dict[str, Any] | None = None, figures: dict[str, Any] | None = None
) -> Path:
    """A copy of the finished run with another adapter's options and other figures."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    content = yaml.safe_load((finished / "config.yaml").read_text())
    content["model"]["init_args"]["adapter"]["init_args"] |= options or {}
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (folder / "results.json").write_text(
        json.dumps(json.loads((finished / "results.json").read_text()) | (figures or {}))
    )
    return folder


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if re.match(rf"{re.escape(name)}  ", line)]
    return re.split(r"\s{2,}", line)[1:]


def test_two_runs(run: Run, finished: Path) -> None:
    copy(finished, "one", figures={"test/acc": 0.5, "fit_seconds": 2.0})
    copy(finished, "two", {"rank": 8, "alpha": 1.0}, {"test/acc": 0.625, "fit_seconds": 3.0, "trainable_parameters": 7})
    result = run("compare", "runs/one", "runs/two")
    assert result.code == 0 and not result.err
    assert row(result.out, "option") == ["one", "two"]
    assert row(result.out, "model.adapter.rank") == ["6", "8"] and row(result.out, "model.adapter.alpha") == [
        "10.0",
        "1.0",
    ]
    assert "model.adapter.basis  " not in result.out  # the same in both
    assert row(result.out, "test/acc, %") == ["50.00", "62.50", "+12.50"]
    assert row(result.out, "fit_seconds") == ["2", "3", "+1"]
    before = json.loads((finished / "results.json").read_text())
    parameters = before["trainable_parameters"]
    assert row(result.out, "trainable_parameters") == [f"{parameters:,}", "7", f"{7 - parameters:,}"]
    memory = f"{before['peak_memory_bytes'] / 1e6:,.2f}"
    assert row(result.out, "peak_memory, MB") == [memory, memory, "0.00"]
    (common,) = [line for line in result.out.splitlines() if line.startswith("Equal in all runs: ")]
    assert "data.dataset digits" in common and "model.name tiny" in common


def test_columns_are_headed_by_the_names_of_the_runs(run: Run, finished: Path) -> None:
    times = ["a/2026-01-02_03-04-05", "b/2026-01-02_03-04-05", "a/2026-01-02_03-04-05_2"]
    folders = [str(copy(finished, name)) for name in times]
    assert row(run("compare", *folders[:2]).out, "result") == ["a", "b", "difference"]
    assert row(run("compare", *folders).out, "result") == times


def test_three_runs_have_no_difference_column(run: Run, finished: Path) -> None:
    folders = [str(copy(finished, name)) for name in ("a", "b", "c")]
    result = run("compare", *folders)
    assert "No option differs." in result.out and row(result.out, "result") == ["a", "b", "c"]


def test_runs_of_one_name_are_told_apart(run: Run, finished: Path) -> None:
    folders = [str(copy(finished, f"{name}/2026-01-01")) for name in ("a", "b")]
    assert row(run("compare", *folders).out, "result")[:2] == ["a/2026-01-01", "b/2026-01-01"]


def test_json(run: Run, finished: Path) -> None:
    folders = [str(copy(finished, "a")), str(copy(finished, "b", {"rank": 8}, {"finished": False}))]
    result = run("compare", *folders, "--json")
    content = json.loads(result.out)
    assert [one["run"] for one in content["runs"]] == folders and not result.err
    assert [one["finished"] for one in content["runs"]] == [True, False]
    assert [one["config"]["model.adapter.rank"] for one in content["runs"]] == [6, 8]
    assert content["runs"][0]["results"] == json.loads((finished / "results.json").read_text())
    assert content["problems"] == [f"{folders[1]} is not finished. Resume: randlora-pl fit --resume {folders[1]}"]


def test_damaged_and_unfinished_runs_are_told(run: Run, finished: Path) -> None:
    shutil.copytree(finished, "whole")
    shutil.copytree(finished, "edited")
    config = Path("edited/config.yaml")
    config.write_text(config.read_text().replace("rank: 6", "rank: 12"))
    for name in ("cut", "early"):
        shutil.copytree(finished, name)
    Path("cut/results.json").write_text('{"test/acc": 0.')
    Path("cut/config.yaml").write_text("model: [")
    Path("early/results.json").unlink()
    result = run("compare", "whole", "edited", "cut", "early")
    assert result.code == 0
    assert row(result.out, "model.adapter.rank") == ["6", "12", "?", "6"]
    values = json.loads((finished / "results.json").read_text())
    assert row(result.out, "test/acc, %") == [f"{100 * values['test/acc']:.2f}"] * 2
    for line in (
        "edited/config.yaml is cut off or damaged, or was edited",
        "cut/config.yaml cannot be read",
        "cut/results.json is cut off or damaged",
        "early has no results yet",
    ):
        assert f"randlora-pl: warning: {line}" in result.err


def test_a_run_without_a_config(run: Run, finished: Path) -> None:
    shutil.copytree(finished, "whole")
    Path("bare").mkdir()
    shutil.copy(finished / "results.json", "bare/results.json")
    result = run("compare", "whole", "bare")
    assert result.code == 0 and "config.yaml" in result.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "compare: give two runs"),
        (["whole"], "compare: give two runs"),
        (["whole", "./whole"], "compare: whole is there twice"),
        (["whole", "none"], "none is not a run folder: it has no config.yaml"),
        (["whole", "none", "--jsn"], "Did you mean '--json'"),
    ],
)
def test_mistakes(refused: Callable[..., str], finished: Path, words: list[str], message: str) -> None:
    shutil.copytree(finished, "whole")
    assert message in refused("compare", *words)


def test_compare_needs_no_pytorch() -> None:
    import subprocess
    import sys

    verbs = "randlora_pl.commands.results, randlora_pl.commands.results"
    code = f"import sys; import {verbs}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
