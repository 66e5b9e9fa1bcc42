"""Plateaus of accuracy against the rate, and what the paper's rate loses."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pandas import Series

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("one_rate")


@given(st.lists(st.one_of(st.just(float("nan")), st.floats(85, 90)), min_size=1, max_size=11))
def test_a_plateau_is_the_longest_row_around_the_best_rate(script: ModuleType, means: list[float]) -> None:
    if all(mean != mean for mean in means):
        return
    best = max(mean for mean in means if mean == mean)
    place, near = means.index(best), [mean >= best - 1 for mean in means]
    rows = [range(low, high) for low in range(place + 1) for high in range(place + 1, len(means) + 1)]
    longest = max((row for row in rows if all(near[index] for index in row)), key=len)
    assert script.plateau(Series(means, index=[2.0**k for k in range(len(means))])) == [2.0**k for k in longest]


def test_a_row_says_what_the_paper_s_rate_loses_and_where_runs_fail(script: ModuleType, tmp_path: Path) -> None:
    """`cells.csv` has no rate of a failed run, also where all runs of a rate failed."""
    accuracies = {0.001: (80, 82), 0.002: (89, 91), 0.004: (89.5, 89.5), 0.008: ("", ""), 0.016: (90, "")}
    lines = [
        f"clothes,LoRA-32 at {rate:g},{seed},{accuracy}," + (f"{rate},finished" if accuracy else ",failed")
        for rate, pair in accuracies.items()
        for seed, accuracy in enumerate(pair, 1)
    ]
    file, header = tmp_path / "cells.csv", "dataset,method,seed,accuracy,learning_rate,state"
    file.write_text("\n".join([header, *lines]))
    ((*row, lost, breaks),) = script.summary(script.curves(file))
    assert row[:2] == ["clothes", "LoRA-32"] and row[3:5] == ["0.002", "2 (0.002 to 0.004)"]
    assert row[2].startswith("90.0 ±") and row[5].startswith("81.0 ±") and row[5].endswith("(0.001)")
    assert lost.startswith("-9.0 ± 0.0") and breaks == "0.008"
    file.write_text("\n".join([header, *lines[2:6], "clothes,LoRA-32 at 0.001,1,90,0.001,finished"]))
    ((*_, wide, at_own, lost, _),) = script.summary(script.curves(file))
    assert (wide, at_own, lost) == ("at least 2 (0.002 to 0.004)", "failed (0.001)", "failed")
    file.write_text("\n".join([header, *lines, "clothes,LoRA-32 at 0.032,1,,,not run"]))
    with pytest.raises(SystemExit, match="1 runs are not finished"):
        script.curves(file)


def test_a_method_of_which_every_rate_failed_has_a_row_without_figures(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {0.001: 80, 0.002: 89}
    worked = [f"clothes,LoRA-32 at {rate},1,{accuracy},{rate},finished" for rate, accuracy in runs.items()]
    failed = [f"clothes,DoRA-16 at {rate},1,,,failed" for rate in runs]
    header = "dataset,method,seed,accuracy,learning_rate,state"
    (tmp_path / "cells.csv").write_text("\n".join([header, *worked, *failed]))
    monkeypatch.setattr(sys, "argv", ["one_rate.py", str(tmp_path)])
    script.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["clothes", "DoRA-16", "failed", "", "", "", "", "0.001"] in rows
    assert next(row for row in rows if row[1] == "LoRA-32")[3] == "0.002" and (tmp_path / "one_rate.png").is_file()
