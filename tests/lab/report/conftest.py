from pathlib import Path

import pytest

from randlora_pl.lab.report.cells import Sweep
from randlora_pl.lab.report.collect import read_sweep
from randlora_pl.lab.report.files import write_report
from tests.lab.report.sweeps import Labels, write_sweep
from tests.support.shared import made_once


def lacks(labels: Labels) -> bool:
    """Cells of the sweep below that were never run."""
    place = (labels["method"], labels["dataset"], labels["budget"])
    return place == ("NoLA", "oxfordpets", "16-shot") or (place, labels["seed"]) == (("LoRA-16", "cars", "100%"), 3)


def failure(labels: Labels) -> str | None:
    """Why cells of the sweep below failed."""
    place = (labels["model"], labels["method"], labels["dataset"], labels["budget"])
    if place == ("CLIP-ViT-L/14", "full fine-tuning", "eurosat", "1-shot"):
        return "CUDA out of memory: tried to allocate 2.3 GiB of 23.9 GiB; use --data.batch_size 32"
    if place[1:] == ("RandLoRA-6", "dtd", "4-shot") and labels["seed"] == 2:
        return "the loss is not finite at step 12"
    return None


def rank_of(labels: Labels) -> dict[str, list[float]]:
    """As the callback `UpdateSpectrum` writes them: over training steps."""
    ranks = {"NoLA": 1.0, "VeRA-256": 180.0, "LoRA-16": 14.0, "LoRA-32": 25.0, "RandLoRA-6": 300.0}
    if labels["method"] not in ranks:
        return {}
    return {"spectrum/steps": [40, 80], "spectrum/effective_rank": [1000.0, ranks[labels["method"]]]}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, five datasets, four budgets, six methods, three seeds; some missing, some failed. Read only."""

    def make(folder: Path) -> None:
        write_sweep(folder, keep=lambda labels: not lacks(labels), fail=failure, more=rank_of)

    return made_once(tmp_path_factory, "made-up", make)


@pytest.fixture(scope="session")
def sweep(folder: Path) -> Sweep:
    return read_sweep(folder)


@pytest.fixture(scope="session")
def report(sweep: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of this sweep. Read only."""
    return made_once(tmp_path_factory, "made-up-report", lambda output: write_report(sweep, output))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are left empty: to draw them takes longer than all else in a report."""
    monkeypatch.setattr("randlora_pl.lab.report.files.draw", lambda *_: b'<svg><g id="part"></g></svg>')
