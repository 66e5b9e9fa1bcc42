"""Several processes of one machine, and job arrays through submitit; nothing is contacted."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from randlora_pl.commands.sweep_job import run_in_job
from randlora_pl.sweep import loop
from randlora_pl.utils.errors import UserError
from tests.support.cli import Run
from tests.sweep.grids import written
from tests.sweep.test_devices import put_slurm_into, within


def test_cores_and_gpus_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    environments = loop.environments_of(3, 1)
    assert [one["OMP_NUM_THREADS"] for one in environments] == ["2"] * 3
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments] == ["4", "6", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7,9")
    pairs = loop.environments_of(2, 2)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in pairs] == ["4,6", "7,9"]
    assert [one["OMP_NUM_THREADS"] for one in pairs] == ["2"] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(Path, "glob", lambda *_: map(Path, "abc"))  # three GPUs, which are hidden
    assert loop.visible_gpus() == [] and loop.environments_of(2, 1)[1]["CUDA_VISIBLE_DEVICES"] == ""


def test_processes_are_ended_with_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, plain = [], subprocess.Popen

    def sleeping(command: list[str], **options: Any) -> Any:
        started.append(plain(["sleep", "60"], **options))
        return started[-1]

    monkeypatch.setattr(loop.subprocess, "Popen", sleeping)
    with pytest.raises(KeyboardInterrupt):
        loop.local(["sweep"], tmp_path, [dict(os.environ)] * 2, Mock(side_effect=KeyboardInterrupt))
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_processes_end_with_a_killed_one(tmp_path: Path) -> None:
    """The one that `local` starts writes its number, and waits; what starts it is killed."""
    child = tmp_path / "child"
    code = "import os, sys, time; from randlora_pl.sweep.loop import end_with_parent as end; end();"
    code += f"open({str(tmp_path / 'started')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    child.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    child.chmod(stat.S_IRWXU)
    parent = "import os, sys; from pathlib import Path; from randlora_pl.sweep import loop;"
    parent += f"sys.executable = {str(child)!r}; loop.local([], Path({str(tmp_path)!r}), [dict(os.environ)], print)"
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        within(20, lambda: (tmp_path / "started").exists() and (tmp_path / "started").read_text())
        process.kill()
    number = int((tmp_path / "started").read_text())
    within(10, lambda: not _running(number))


def _running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_last_look_is_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, seen = iter([None]), []  # it ends while it is asked whether it runs
    process = Mock(returncode=0, poll=lambda: next(answers, 0))
    monkeypatch.setattr(loop.subprocess, "Popen", lambda *args, **options: process)
    assert loop.local(["sweep"], tmp_path, [{}], lambda: seen.append(process.poll())) == [0]
    assert len(seen) == 2


def test_without_submitit_and_with_a_job_that_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit", reason="the extra slurm is not installed")
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "1")
    with pytest.raises(RuntimeError, match="ended"):
        run_in_job(["sweep", "nothing.yaml"])
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="install"):
        loop.slurm(run_in_job, ["sweep"], tmp_path, 1, [])


def test_what_is_submitted_to_slurm(run: Run, tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit", reason="the extra slurm is not installed")
    written(tmp_path)
    put_slurm_into(tmp_path)
    words = ("--slurm", "slurm_partition=gpu", "timeout_min=90", "gpus_per_node=1")
    result = run("sweep", "small.yaml", "--launcher", "slurm", "--jobs", "3", "--only", "method=LoRA-4", *words)
    assert result.code == 0, result.err
    assert "submitted 3 jobs: 4711_0, 4711_1, 4711_2" in result.out
    script = (tmp_path / "submitted").read_text()
    for line in ("--array=0-2", "--partition=gpu", "--time=90", "--gpus-per-node=1", "--job-name=sweep-small"):
        assert line in script
    (first, *_) = sorted((tmp_path / "runs/sweeps/small/slurm").glob("*_submitted.pkl"))
    call = submitit.core.utils.DelayedSubmission.load(first)
    assert call.function.__module__ == "randlora_pl.commands.sweep_job" and call.function.__name__ == "run_in_job"
    assert call.args[0][:2] == ["sweep", str(tmp_path / "small.yaml")]
    assert call.args[0][2:] == ["--output", str(tmp_path / "runs/sweeps/small"), "--only", "method=LoRA-4"]
    for bad, said in ((("timeout=1",), "timeout"), (("partition",), "expected KEY=VALUE")):
        failed = run("sweep", "small.yaml", "--launcher", "slurm", "--slurm", *bad)
        assert failed.code == 2 and said in failed.err and len(failed.err.splitlines()) == 1
    searched, folder = run("tune", "small.yaml", "--launcher", "slurm", "--jobs", "2"), tmp_path / "runs/tune/small"
    assert searched.code == 0 and "submitted 2 jobs: 4711_0, 4711_1" in searched.out, searched.err
    assert "randlora-pl tune small.yaml --output runs/tune/small --dry-run" in searched.out
    call = submitit.core.utils.DelayedSubmission.load(sorted(folder.glob("slurm/*_submitted.pkl"))[0])
    assert call.args[0] == ["tune", "small.yaml", "--output", str(folder)]
    assert "Next:" not in searched.out and not (folder / "tuned.yaml").exists()
