"""The shipped scripts and the page about many devices start what they say, as far as stubs can tell."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from randlora_pl.commands.main import main
from randlora_pl.run.options.shipped import config_folder, scripts
from randlora_pl.run.session import prepare, resume_by_itself
from tests.docs.pages import commands_of
from tests.support.cli import Run

WORDS = ["--config", "quickstart", "--data.steps", "3"]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs a script with stubs that write down their arguments."""
    for name, body in {"torchrun": "", "srun": "${SRUN:-exit 0}", "scontrol": "", "squeue": "echo $STATE"}.items():
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/{name}.args\n{body}\n')
        stub.chmod(0o755)

    def call(script: str, **more: str) -> subprocess.Popen[str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        command = ["bash", str(config_folder() / "cluster" / script), *WORDS]
        return subprocess.Popen(command, env=os.environ | {"PATH": path} | more, stderr=subprocess.PIPE, text=True)

    return call


def arguments(tmp_path: Path, stub: str) -> list[str]:
    return (tmp_path / f"{stub}.args").read_text().splitlines()


@pytest.mark.parametrize("name", scripts())
def test_scripts_are_sound_and_open_with_what_they_are_for(name: str) -> None:
    file = scripts()[name]
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
    head = re.split(r"^[^#]", file.read_text(), maxsplit=1, flags=re.M)[0]
    assert f"configs/{name}" in head and "# Cost: " in head


def test_the_command_of_torchrun_is_one_of_ours(start: Start, tmp_path: Path) -> None:
    process = start("torchrun.sh", GPUS="2", NODES="2", NODE="1", MASTER="node0", NAME="mine")
    assert process.wait(timeout=60) == 0
    words = arguments(tmp_path, "torchrun")
    own = words[words.index("randlora_pl") + 1 :]
    assert words[: words.index("-m")] == [
        *("--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "2", "--master-addr", "node0"),
        *("--master-port", "29500", "--max-restarts", "3"),
    ]
    command = prepare(own[0], resume_by_itself(own[1:]))
    assert (command.verb, command.flat()["run.name"], command.flat()["data.steps"]) == ("fit", "mine", 3)


def test_torchrun_without_a_gpu_says_what_to_do(start: Start) -> None:
    process = start("torchrun.sh", GPUS="0")
    assert process.wait(timeout=60) == 2
    assert process.stderr is not None and "GPUS=2" in process.stderr.read()


def test_the_command_of_slurm_is_one_of_ours(start: Start, tmp_path: Path) -> None:
    process = start("slurm.sbatch", SLURM_CPUS_PER_TASK="8", **JOB)
    assert process.wait(timeout=60) == 0
    words = arguments(tmp_path, "srun")
    own = words[words.index("randlora-pl") + 1 :]
    command = prepare(own[0], resume_by_itself(own[1:]))
    assert (command.verb, command.flat()["run.name"]) == ("fit", "randlora-77")
    assert not (tmp_path / "scontrol.args").exists()


JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "randlora"}


@pytest.mark.parametrize(
    ("code", "restarts", "state", "again"),
    [
        (0, 0, "RUNNING", False),
        (1, 0, "RUNNING", True),
        (137, 2, "RUNNING", True),
        (143, 0, "RUNNING", True),
        (1, 3, "RUNNING", False),
        (2, 0, "RUNNING", False),
        (143, 0, "COMPLETING", False),  # was cancelled
    ],
)
def test_slurm_queues_again_what_another_try_can_mend(
    start: Start, tmp_path: Path, code: int, restarts: int, state: str, again: bool
) -> None:
    more = JOB | {"SLURM_RESTART_COUNT": str(restarts), "STATE": state}
    assert start("slurm.sbatch", SRUN=f"exit {code}", **more).wait(timeout=60) == code
    assert (tmp_path / "scontrol.args").exists() == again


def test_slurm_queues_again_before_the_time_limit(start: Start, tmp_path: Path) -> None:
    ended = f"for _ in {{1..600}}; do [ -e {tmp_path}/scontrol.args ] && exit; sleep 0.05; done"  # by the requeue
    (tmp_path / "tasks.sh").write_text(ended)
    process = start("slurm.sbatch", SRUN=f"exec bash {tmp_path}/tasks.sh", **JOB)
    while not (tmp_path / "srun.args").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    process.wait(timeout=60)
    assert arguments(tmp_path, "scontrol") == ["requeue", "77"]


def test_scripts_are_listed_and_copied(run: Run, tmp_path: Path) -> None:
    listed = run("config", "list").out
    assert all(name in listed for name in scripts())
    assert run("config", "cp", "slurm.sbatch").code == 0
    assert (tmp_path / "slurm.sbatch").read_text() == run("config", "cat", "cluster/slurm.sbatch").out


ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "many_devices.md").read_text(encoding="utf-8")


def test_its_commands_and_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    fits = [words[1:] for words in commands_of(PAGE) if words[0] == "fit"]
    assert [prepare("fit", fit).flat()["model.name"] for fit in fits] == ["ViT-B-32", "ViT-H-14"]
    assert main(["fit", "--help"]) == 0
    page = capsys.readouterr().out
    for option in ("--run.timeout", "--resume", "--run.name", "--checkpoint.every_n_steps", "loss_batch"):
        assert option in page and option in PAGE, option
    for path in re.findall(r"(?:bash|sbatch|python) ((?:configs|scripts)/\S+)|`(tests/\S+\.py)`", PAGE):
        assert (ROOT / "".join(path)).is_file(), path
