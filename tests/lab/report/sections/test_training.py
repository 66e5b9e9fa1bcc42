"""Steps to the loss of a reference, from the logs of the runs or from ``cells.csv``."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from randlora_pl.lab.report.collect import TRAINED, VALIDATED, losses, read_curves, read_sweep, scores
from randlora_pl.lab.report.files import draw, write_report
from randlora_pl.lab.report.plots import curve_pictures
from randlora_pl.lab.report.training import training_table
from tests.lab.report.sweeps import METHODS, MODELS, description, write_sweep

B32 = "CLIP-ViT-B/32"
SLOPES = {"LoRA-16": 1.0, "LoRA-32": 1.0, "RandLoRA-6": 2.0, "full fine-tuning": 0.5}


def logged(
    folder: Path, loss: Callable[[int], object], validated: dict[int, float], every: int = 1, name: str = "csv"
) -> None:
    lines = ["step,train/loss,val/acc"]
    for step in range(1, 81):
        lines += [f"{step},{loss(step)},"] * (step % every == 0)
        lines += [f"{step},,{validated.get(step)}"] * (step in validated)
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_steps_and_time_to_the_loss_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = description(models={B32: MODELS[B32]}, datasets=["cars", "dtd"], budgets=[1], paper=None)
    content["methods"] = {name: METHODS[name] for name in ["VeRA-256", *SLOPES]}
    folder = write_sweep(tmp_path / "sweep", content, zeroshot=False)
    for cell in (folder / "cells").iterdir():
        labels = json.loads((cell / "cell.json").read_text())
        if slope := SLOPES.get(labels["method"]):
            start = 2 + labels["seed"] / 10  # seeds are paired, so that this makes no difference
            logged(cell, lambda step, start=start, slope=slope: start - slope * step / 80, {40: 0.5, 80: 0.6})

    def only_curves(figure: Any, form: str, name: str) -> bytes:
        return draw(figure, form, name) if name.startswith("curves") and form == "svg" else b"<svg></svg>"

    monkeypatch.setattr("randlora_pl.lab.report.files.draw", only_curves)
    write_report(read_sweep(folder), tmp_path / "report")
    again = read_sweep(tmp_path / "report")
    drawings = {path.name: path.read_bytes() for path in (tmp_path / "report" / "figures").glob("curves-*.svg")}
    curves = zip(again.finished["method"], again.finished[VALIDATED], strict=True)
    assert all((scores(curve) == {40: 50, 80: 60}) == (method in SLOPES) for method, curve in curves)
    for sweep in (read_sweep(folder), again):
        table = training_table(sweep, B32)
        assert table is not None
        rows = {cells[0].text: [cell.text for cell in cells[1:]] for cells in table.rows}
        assert list(rows) == list(SLOPES), "a method without a log has no row"
        steps = 100 * 9 / 16  # the first part of 5 steps with 2 - 2 t / 80 <= 2 - 78 / 80, in its middle t
        assert rows["RandLoRA-6"] == [
            *("LoRA-32", f"{steps:.0f} ± 0", "0 of 6", f"{steps * 1.1 / 0.9:.0f} ± 0", "122 ± 0"),
            *("-0.100 ± 0.000", "-0.225 ± 0.000", "-0.475 ± 0.000", "-0.975 ± 0.000"),
        ]
        assert rows["LoRA-16"] == ["itself", "100 ± 0", "0 of 6", "100 ± 0", "100 ± 0", *[""] * 4]
        assert rows["full fine-tuning"][:4] == ["LoRA-32", "100 ± 0", "6 of 6", f"{100 / 0.9:.0f} ± 0"]
        (picture,) = curve_pictures(sweep, B32)
        figure: Any = picture.figure
        assert {f"{picture.name}.svg": draw(figure, "svg", picture.name)} == drawings
        assert [panel.get_ylabel() for panel in figure.axes] == ["validation accuracy, %", "training loss"]
        lines = [{line.get_label(): line.get_xydata().tolist() for line in panel.lines} for panel in figure.axes]
        assert list(lines[0]) == list(lines[1]) == ["LoRA-32", "RandLoRA-6", "full fine-tuning"]
        assert lines[0]["RandLoRA-6"] == [[50, 50], [100, 60]], "no run names its steps, so that they are percents"
        assert lines[1]["RandLoRA-6"][0] == pytest.approx([100 / 16, 2.2 - 2 * 3 / 80], rel=1e-3)
        assert (
            "2 datasets" in picture.caption and "RandLoRA-6 validation accuracy, % from 50 to 60" in picture.described
        )
        unvalidated = replace(sweep, cells=sweep.cells.assign(**{VALIDATED: None}))
        (picture,) = curve_pictures(unvalidated, B32)
        assert [panel.get_ylabel() for panel in picture.figure.axes] == ["training loss"]  # type: ignore[attr-defined]
        sweep.plan.pairs[:] = [["RandLoRA-6", "LoRA-32"]]
        (picture,) = curve_pictures(sweep, B32)
        assert "full fine-tuning" not in picture.described
        sweep.plan.pairs[:] = [["RandLoRA-6", "LoRA-32"], ["LoRA-32", "VeRA-256"], ["VeRA-256", "full fine-tuning"]]
        (picture,) = curve_pictures(sweep, B32)
        assert "full fine-tuning" in picture.described and "VeRA-256" not in picture.described, "it has no log"


def test_logs_that_are_missing_short_or_damaged(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    logged(tmp_path, lambda step: 1 / step, {80: 0.5}, every=10)
    facts = read_curves(tmp_path)
    assert losses(facts[TRAINED]) == pytest.approx([1 / step for step in range(10, 81, 10)], rel=1e-3)
    assert VALIDATED not in facts, "one validation is no curve"
    logged(tmp_path, lambda step: "nan" if step > 40 else 1, {step: step / 100 for step in range(1, 81)})
    facts = read_curves(tmp_path)
    assert (
        losses(facts[TRAINED]) == [1.0] * 8
        and len(scores(facts[VALIDATED])) == 16
        and scores(facts[VALIDATED])[80] == pytest.approx(80)
    )
    file = tmp_path / "csv" / "metrics.csv"
    file.write_text(file.read_text() + "81,0.5\n82,,,,7\nx,1,1\n83")
    assert losses(read_curves(tmp_path)[TRAINED]) == [1, 1, 0.5], "in three parts each has a value"
    for name, steps in {"csv_2": range(21, 61), "csv_10": range(61, 81), "csv": range(1, 33)}.items():
        logged(tmp_path / "parts", lambda step, n=name, of=steps: len(n) if step in of else "", {}, name=name)
    assert losses(read_curves(tmp_path / "parts")[TRAINED]) == [3] * 4 + [5] * 8 + [6] * 4, (
        "the later part of a run counts"
    )
    for damage in (b"", b"\xff\xfe\x00", b"step,train/loss\n1,\x00", b"train/loss\n1\n"):
        file.write_bytes(damage)
        assert read_curves(tmp_path) == {}, damage
    assert losses("1 x 2") == [1, 2] and scores("7 8:x 9:0.5") == {9: 50}
