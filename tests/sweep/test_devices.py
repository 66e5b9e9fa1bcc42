"""Cells on several devices: a process for each, by torchrun and by the tasks of a job of submitit."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from randlora_pl.sweep import loop
from randlora_pl.sweep.folder import DONE, FAILED, SweepFolder
from randlora_pl.sweep.loop import Loop, Runner
from randlora_pl.utils.errors import LostProcessError, UserError
from tests.run.parallel.processes import meetings
from tests.support.cli import Refused, Run
from tests.sweep.grids import GRID, cells_of, written

TWO = {"methods": {"LoRA-4": {"adapter": "LoRA", "rank": 4}}, "set": GRID["set"] | {"trainer.devices": 2}}
"""One cell on two devices."""


def test_devices_are_part_of_a_cell_but_one() -> None:
    (two,), (one,), (same,) = (
        cells_of(**TWO | {"set": GRID["set"] | more}) for more in ({"trainer.devices": 2}, {"trainer.devices": 1}, {})
    )
    assert (two.devices, one.devices) == (2, 1)
    assert one.hash == same.hash != two.hash, "two devices draw twice as many images for a step"


def test_what_cannot_run_is_refused_before_anything_starts(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1,2"  # of the copy that the fixture `run` made
    written(tmp_path, **TWO | {"set": TWO["set"] | {"trainer.accelerator": "auto"}})
    assert "trainer.devices times --jobs is 4, but 3 GPUs are visible" in refused("sweep", "small.yaml", "--jobs", "2")
    mixed(tmp_path)
    assert "the cells differ in trainer.devices" in refused("sweep", "mixed.yaml", "--launcher", "slurm")
    pruned = ("--search", "rank=1..4", "--sampler", "tpe", "--trials", "2", "--pruner", "median")
    assert "--pruner needs cells on one device" in refused("tune", "small.yaml", *pruned)


def mixed(folder: Path) -> None:
    """A sweep with a cell on one device and a cell on two."""
    methods = {f"LoRA-{rank}": {"adapter": "LoRA", "rank": rank, "set": {"trainer.devices": rank}} for rank in (1, 2)}
    written(folder, "mixed.yaml", methods=methods)


@pytest.mark.parametrize(("mistake", "kind"), [(True, UserError), (False, LostProcessError), (None, LostProcessError)])
def test_the_error_of_a_process_is_the_error_of_the_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: bool | None, kind: type[Exception]
) -> None:
    """Without an error that was written, a process was killed. The lock is free again, and the next try works."""
    (cell,), folder = cells_of(**TWO), SweepFolder(tmp_path)
    error = {"mistake": mistake, "reason": "process 1: the loss is nan", "traceback": "line 7"}

    def process(module: Any, place: Path, environment: Any) -> int:
        assert read(place, "cell.json")["place"] == str(folder.cell_path(cell))
        if mistake is not None:
            (place / "error.json").write_text(json.dumps(error))
        return 1

    monkeypatch.setattr(loop, "_process", process)
    with pytest.raises(kind, match="a process was killed" if mistake is None else "process 1: the loss is nan"):
        Runner()(cell, folder.begin(cell))
    Loop(folder, [cell], Runner()).work()
    failure = folder.failure(cell)
    assert folder.state(cell) == FAILED and failure["tries"] == 1 and not folder.worker(cell)
    assert ("line 7" in failure.get("traceback", "")) == (mistake is False)

    def works(module: Any, place: Path, environment: Any) -> int:
        assert not (place / "error.json").exists()
        (folder.cell_path(cell) / "results.json").write_text('{"finished": true}')
        return 0

    monkeypatch.setattr(loop, "_process", works)
    Loop(folder, [cell], Runner(), retry_failed=True).work()
    assert folder.state(cell) == DONE


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / name).read_text())
    return content


def test_torchrun_and_processes_that_fail_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are real, and end before they import Lightning."""
    (cell,), folder = cells_of(**TWO), SweepFolder(tmp_path)
    monkeypatch.setattr(loop, "named_modules", lambda: {"nothing_like_it": None})
    with pytest.raises(UserError, match="the module nothing_like_it is neither"):
        Runner()(cell, folder.begin(cell))


def test_the_tasks_of_a_job_follow_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks are threads. In the second cell process 1 is killed; the sweep goes on, and all end with it."""
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    known, own, ended = meetings(2), threading.local(), list[tuple[int, str, str]]()
    task = lambda: SimpleNamespace(rank=own.rank, world_size=2, export=lambda **options: None)  # noqa: E731
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment", task)
    monkeypatch.setattr(loop, "meeting_of", lambda job, timeout: known[job.rank] if job.world == 2 else None)

    def process(module: list[str], folder: Path, environment: dict[str, str], stopped: Callable[[], bool]) -> int:
        ended.append((own.rank, str(folder), environment["TORCHELASTIC_RESTART_COUNT"]))
        if str(folder) == "two" and own.rank == 1:
            return -9
        until = time.monotonic() + 10
        while str(folder) == "two" and not stopped() and time.monotonic() < until:
            time.sleep(0.01)
        return 143 if stopped() else 0

    def lead() -> int:
        for name in ("one", "two", "three"):
            loop._task[0](Path(name))
        return 7

    codes = [-1, -1]

    def run(rank: int) -> None:
        own.rank = rank
        codes[rank] = loop.in_task(lead)

    monkeypatch.setattr(loop, "_process", process)
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == [7, 0]
    cells = [("one", "1"), ("two", "2"), ("three", "3")]
    assert sorted(ended) == sorted((rank, *cell) for rank in range(2) for cell in cells)


def test_the_tasks_that_are_submitted(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    written(tmp_path, **TWO)
    (tools := tmp_path / "bin").mkdir()
    for name, body in {"sbatch": f"cp $1 {tmp_path}/submitted; echo Submitted batch job 4711", "srun": ""}.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o700)
    os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"  # of the copy that the fixture `run` made
    result = run("sweep", "small.yaml", "--launcher", "slurm", "--slurm", "gpus_per_node=2")
    assert result.code == 0, result.err
    script = (tmp_path / "submitted").read_text()
    for line in ("--ntasks-per-node=2", "--gpus-per-node=2", "--kill-on-bad-exit=1"):
        assert line in script
    for bad, said in (("tasks_per_node=1", "the cells need tasks_per_node=2"), ("gpus_per_node=1", "must be 2")):
        failed = run("sweep", "small.yaml", "--launcher", "slurm", "--slurm", bad)
        assert failed.code == 2 and said in failed.err
