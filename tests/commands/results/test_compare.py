import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.lab.report.sweeps import METHODS, description, write_sweep
from tests.support.cli import Refused, Run


def copy(
    finished: Path, name: str, options: dict[str, Any] | None = None, figures: dict[str, Any] | None = None
) -> Path:
    """A copy of the finished run with another adapter's options and other figures."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    content = yaml.safe_load((finished / "config.yaml").read_text())
    content["model"]["init_args"]["adapter"]["init_args"] |= options or {}
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    results = json.loads((finished / "results.json").read_text()) | (figures or {})
    (folder / "results.json").write_text(json.dumps(results))
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
    assert row(result.out, "model.adapter.rank") == ["6", "8"]
    assert row(result.out, "model.adapter.alpha") == ["10.0", "1.0"]
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


def test_the_metric_that_counts_for_the_task_leads(run: Run, finished: Path) -> None:
    for name, loss in (("one", 0.5), ("two", 0.25)):
        copy(finished, name, figures={"metric": "mae", "test/mae": 1.5, "best/val/mae": 1.25, "test/loss": loss})
    shown = run("compare", "runs/one", "runs/two").out
    table = shown[shown.index("\nresult  ") :]
    assert [line.partition("  ")[0] for line in table.splitlines()[2:5]] == ["test/mae", "best/val/mae", "test/loss"]
    assert row(shown, "test/mae") == ["1.5", "1.5", "0"]


def test_columns_are_headed_by_what_tells_the_runs_apart(run: Run, finished: Path) -> None:
    times = ["a/2026-01-02_03-04-05", "b/2026-01-02_03-04-05", "a/2026-01-02_03-04-05_2"]
    folders = [str(copy(finished, name)) for name in (*times, "one/2026-01-01", "two/2026-01-01")]
    assert row(run("compare", *folders[:2]).out, "result") == ["a", "b", "difference"]
    three = run("compare", *folders[:3]).out
    assert row(three, "result") == times and "No option differs." in three
    assert row(run("compare", *folders[3:]).out, "result")[:2] == ["one/2026-01-01", "two/2026-01-01"]


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
    Path("bare").mkdir()
    shutil.copy(finished / "results.json", "bare/results.json")
    bare = run("compare", "whole", "bare")
    assert bare.code == 0 and "config.yaml" in bare.err
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "compare: give two runs"),
        (["compare", "whole"], "compare: give two runs"),
        (["compare", "whole", "./whole"], "compare: whole is given twice"),
        (["compare", "whole", "none"], "none is not a run folder: it has no config.yaml"),
        (["compare", "whole", "none", "--jsn"], "Did you mean '--json'"),
        (["report", "none"], "none does not exist. A sweep is a folder such as runs/sweeps/NAME"),
        (["report", "."], "Did you mean sweep?"),
        (["report", "sweep/cells"], "sweep/cells is not a sweep"),
        (["report", "sweep", "--ouput", "x"], "Did you mean '--output'"),
        (["report", "sweep", "--output", "sweep/sweep.yaml"], "sweep/sweep.yaml is a file; give a folder"),
        (["report", "sweep", "--output", "sweep"], "sweep exists and is not empty"),
    ],
)
def test_mistakes(refused: Refused, finished: Path, sweep: Path, words: list[str], message: str) -> None:
    shutil.copytree(finished, "whole", dirs_exist_ok=True)
    assert message in refused(*words)


SMALL = description(
    models={"CLIP-ViT-B/32": {}},
    datasets=["cars", "dtd"],
    budgets=[1, "100%"],
    methods={name: METHODS[name] for name in ("LoRA-32", "RandLoRA-6")},
)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep", SMALL, fail=lambda labels: "broken" if labels["seed"] == 3 else None)


def test_report(run: Run, sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randlora_pl.lab.report.files.draw", lambda *_: b"<svg></svg>")
    result = run("report", "sweep")
    assert result.code == 0 and not result.err
    assert result.out.startswith("18 of 26 runs are finished, 8 failed\n")
    for line in result.out.splitlines()[1:-1]:
        name, _, size = line.partition(": ")
        assert Path(name).stat().st_size == int(size.removesuffix(" bytes").replace(",", ""))
    assert result.out.endswith("Next: open sweep/report/index.html in a browser\n")
    again = run("report", "sweep")
    assert again.code == 2 and "sweep/report" in again.err and "--overwrite" in again.err
    assert run("report", "sweep", "--output", "elsewhere/deep").code == 0
    assert Path("elsewhere/deep/index.html").read_bytes() == Path("sweep/report/index.html").read_bytes()
    cell = next(path for path in sorted((sweep / "cells").iterdir()) if (path / "results.json").exists())
    (cell / "results.json").write_text("{")
    result = run("report", "sweep", "--overwrite")
    assert result.code == 0 and "17 of 26 runs are finished" in result.out and "1 damaged" in result.out
    assert result.err.startswith(f"randlora-pl: warning: cells/{cell.name}/results.json is cut off or damaged")
    assert f"cells/{cell.name}/results.json is cut off" in Path("sweep/report/index.html").read_text()
