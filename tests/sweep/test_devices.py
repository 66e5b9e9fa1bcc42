"""Cells on several devices: a process for each, by torchrun and by the tasks of a job of submitit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from randlora_pl.run.run_folder import FILE, holder
from randlora_pl.sweep import loop
from randlora_pl.sweep.folder import DONE, FAILED, OPEN, SweepFolder
from randlora_pl.sweep.loop import Loop, Runner
from randlora_pl.sweep.plan import Cell
from randlora_pl.utils.errors import LostProcessError, UserError
from randlora_pl.utils.run_files import LAST, read_results
from tests.run.parallel.jobs import ended, environment, outputs, spawn
from tests.run.parallel.processes import meetings
from tests.support.cli import Refused, Run
from tests.sweep.grids import GRID, cells_of, written

TWO = {"methods": {"LoRA-4": {"adapter": "LoRA", "rank": 4}}, "set": GRID["set"] | {"trainer.devices": 2}}
"""One cell on two devices."""
LONG = 600
"""Seconds, also for a busy machine."""


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
    error = {"reason": "the loss is nan", "traceback": "" if mistake else "line 7"}
    monkeypatch.setattr(loop, "named_modules", lambda: {"mine": None})

    def process(words: Any, place: Path, *_: Any) -> list[int]:
        assert read(place, "cell.json")["modules"] == ["mine"], "which no other task of a job has imported"
        assert read(place, "cell.json")["place"] == str(folder.cell_path(cell))
        if mistake is not None:
            (place / "error.json").write_text(json.dumps(error))
        return [1]

    monkeypatch.setattr(loop, "local", process)
    with pytest.raises(kind, match="a process was killed" if mistake is None else "the loss is nan"):
        Runner()(cell, folder.begin(cell))
    Loop(folder, [cell], Runner()).work()
    failure = folder.failure(cell)
    assert folder.state(cell) == FAILED and failure["tries"] == 1 and not folder.worker(cell)
    assert ("line 7" in failure.get("traceback", "")) == (mistake is False)

    def works(words: Any, place: Path, *_: Any) -> list[int]:
        assert not (place / "error.json").exists()
        (folder.cell_path(cell) / "results.json").write_text('{"finished": true}')
        return [0]

    monkeypatch.setattr(loop, "local", works)
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
    known, own, done = meetings(2), threading.local(), list[tuple[int, str, str]]()
    task = lambda: SimpleNamespace(rank=own.rank, world_size=2, export=lambda **options: None)  # noqa: E731
    monkeypatch.setattr("submitit.helpers.TorchDistributedEnvironment", task)
    monkeypatch.setattr(loop, "meeting_of", lambda job, timeout: known[job.rank] if job.world == 2 else None)

    def process(words: Any, folder: Path, variables: list[dict[str, str]], stopped: Callable[[], bool]) -> list[int]:
        done.append((own.rank, str(folder), variables[0]["TORCHELASTIC_RESTART_COUNT"]))
        if str(folder) == "two" and own.rank == 1:
            return [-9]
        until = time.monotonic() + 10
        while str(folder) == "two" and not stopped() and time.monotonic() < until:
            time.sleep(0.01)
        return [143 if stopped() else 0]

    def lead() -> int:
        for name in ("one", "two", "three"):
            loop._task[0](Path(name))
        return 7

    codes = [-1, -1]

    def run(rank: int) -> None:
        own.rank = rank
        codes[rank] = loop.in_task(lead)

    monkeypatch.setattr(loop, "local", process)
    monkeypatch.setattr(loop, "_task", [])
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == [7, 0]
    cells = [("one", "1"), ("two", "2"), ("three", "3")]
    assert sorted(done) == sorted((rank, *cell) for rank in range(2) for cell in cells)


def put_slurm_into(folder: Path) -> None:
    """Put stand-ins of SLURM's tools on the path, of which sbatch keeps the script as ``submitted``."""
    (tools := folder / "bin").mkdir()
    for name, body in {"sbatch": f"cp $1 {folder}/submitted; echo Submitted batch job 4711", "srun": ""}.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o700)
    os.environ["PATH"] = f"{tools}:{os.environ['PATH']}"  # of the copy that the fixture `run` made


def test_the_tasks_that_are_submitted(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    written(tmp_path, **TWO)
    put_slurm_into(tmp_path)
    result = run("sweep", "small.yaml", "--launcher", "slurm", "--slurm", "gpus_per_node=2")
    assert result.code == 0, result.err
    script = (tmp_path / "submitted").read_text()
    for line in ("--ntasks-per-node=2", "--gpus-per-node=2", "--kill-on-bad-exit=1"):
        assert line in script
    bad_words = {"tasks_per_node=1": "need tasks_per_node=2", "nodes=2": "need nodes=1", "gpus_per_node=1": "must be 2"}
    for bad, said in bad_words.items():
        failed = run("sweep", "small.yaml", "--launcher", "slurm", "--slurm", bad)
        assert failed.code == 2 and said in failed.err


@pytest.mark.slow
def test_a_cell_on_two_devices_is_fit_on_two_and_one_device_with_twice_the_batch(tmp_path: Path) -> None:
    options, folder = GRID["set"], SweepFolder(tmp_path / "sweep")
    (two,) = cells_of(**TWO | {"set": options | {"trainer.devices": 2}})
    (one,) = cells_of(**TWO | {"set": options | {"data.batch_size": 8}})
    for cell in (two, one):
        Runner()(cell, folder.begin(cell))
    words = ["fit", "--config", str(folder.cell_path(two) / "config.yaml"), "--run.root", str(tmp_path / "runs")]
    subprocess.run([sys.executable, "-m", "randlora_pl", *words], check=True, env=environment(tmp_path))
    (fitted,) = tmp_path.glob("runs/*/2*")
    places = [folder.cell_path(two), fitted, folder.cell_path(one)]
    (ours, typed, single), results = (
        [load_file(place / "adapter" / "adapter.safetensors") for place in places],
        [read_results(place) for place in places],
    )
    assert [each["devices"] for each in results] == [2, 2, 1]
    assert {each["effective_batch"] for each in results} == {8} and {each["steps"] for each in results} == {2}
    for name, tensor in ours.items():
        assert tensor.equal(typed[name]), name
        assert (tensor - single[name]).norm() < 1e-3 * tensor.norm(), name


@pytest.mark.slow
def test_a_job_of_submitit_with_two_tasks_runs_a_cell(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    written(tmp_path, **TWO)
    assert run("sweep", "small.yaml", "--launcher", "slurm", "--slurm", "cluster=local", "timeout_min=10").code == 0
    (cell,), folder = cells_of(**TWO), SweepFolder(tmp_path / "runs/sweeps/small")
    within(LONG, lambda: folder.state(cell) != OPEN and not folder.worker(cell))
    results = folder.results(cell)
    assert results["devices"] == 2 and results["effective_batch"] == 8 and not ranks(folder.path)
    within(60, lambda: len(list(folder.path.glob("slurm/*_result.pkl"))) == 2)  # also the task that follows has ended


@pytest.mark.faults
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_cell_end_with_the_sweep_which_can_be_resumed(tmp_path: Path, ending: int) -> None:
    with long_sweep(tmp_path) as (cell, folder, sweep):
        sweep.send_signal(ending)
        sweep.communicate(timeout=LONG)
        within(90, lambda: not ranks(folder.path))
        assert folder.state(cell) == OPEN and not folder.worker(cell)
        assert not holder(folder.cell_path(cell) / FILE)
    again = spawn([sys.executable, "-m", "randlora_pl", "sweep", "small.yaml"], tmp_path)
    ((code, text),) = outputs([again])
    assert code == 0 and folder.results(cell)["steps"] == 30, text
    assert "cell_seconds" not in folder.results(cell), "it was resumed from its checkpoint"


@pytest.mark.faults
def test_a_process_that_is_killed_ends_its_cell_and_no_other(tmp_path: Path) -> None:
    with long_sweep(tmp_path, seeds=[1, 2]) as (cell, folder, sweep):
        os.kill(ranks(folder.path)[1], signal.SIGKILL)
        within(90, lambda: folder.state(cell) == FAILED)
        text = sweep.communicate(timeout=LONG)[0]
    assert sweep.returncode == 1 and "1 of 2 cells are done, 1 failed" in text
    assert "process" in folder.failure(cell)["reason"] and not ranks(folder.path)


@contextmanager
def long_sweep(folder: Path, **more: Any) -> Iterator[tuple[Cell, SweepFolder, subprocess.Popen[str]]]:
    """A sweep in a process of its own, whose first cell has a checkpoint."""
    grid = TWO | {"set": TWO["set"] | {"data.steps": 30, "checkpoint.every_n_steps": 3}} | more
    written(folder, **grid)
    sweep = spawn([sys.executable, "-m", "randlora_pl", "sweep", "small.yaml"], folder)
    cell, place = cells_of(**grid)[0], SweepFolder(folder / "runs/sweeps/small")
    with ended(sweep):
        within(LONG, lambda: (place.cell_path(cell) / LAST).is_file() or sweep.poll() is not None)
        yield cell, place, sweep


def ranks(folder: Path) -> dict[int, int]:
    """Process ids of the processes of a cell of a sweep, by rank."""
    numbers = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if b"randlora_pl.sweep.cell_process" in words and any(str(folder).encode() in word for word in words):
            rank = [word for word in variables if word.startswith(b"RANK=")]
            numbers |= {int(rank[0].partition(b"=")[2]): int(entry.name)} if rank else {-1: int(entry.name)}
    return numbers


def within(seconds: float, what: Callable[[], object]) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)
