"""The host waits for a GPU at no time between the fourth and the eighth micro-batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from randlora_pl.adapters import read_adapter
from tests.support.products import marked

from .test_ddp import start

ROOT = Path(__file__).parents[2]
OFTEN = ("pruned",)
"""The training by default; `slow` has all ten."""


@pytest.mark.parametrize(("names",), marked(zip([OFTEN, ()]), lambda row: row[0] == OFTEN, pytest.mark.slow))
def test_the_host_never_waits_for_the_device(names: tuple[str, ...], tmp_path: Path) -> None:
    """Real trainings, with all callbacks, a progress bar and a logger, on a device that only counts.

    What code does on a CPU alone is not counted, because its tensors are of another device than the trained ones.
    """
    pytest.importorskip("torch.utils.backend_registration")
    command = [sys.executable, "-m", "tests.support.quick", "tests.tasks.waits_worker", str(tmp_path), *names]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == (len(names) or 10)
    for name, waits in found.items():
        assert waits == {}, name


@pytest.mark.slow
def test_two_processes_exchange_only_gradients_and_curves_and_stop_together(tmp_path: Path) -> None:
    """Also at a non-finite loss of one of them, when no process has changed its weights, and at SIGTERM of one."""
    for process in start(tmp_path, "waits_ddp_worker"):
        output = process.communicate(timeout=600)[0]
        assert process.returncode == 0, output[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for rank in ranks:
        good = rank["VisionLanguageTask"]
        assert good["ended"] == ""
        # gradients and sums for the curves of two optimizer steps; and SIGTERM, which is read a micro-batch later
        assert {name.split(".")[1]: count for name, count in good["seen"].items()} == {"allreduce_": 8}
        assert rank["signaled"]["ended"] == "SIGTERMException" and len(rank["signaled"]["after"]) == 7
    told, silent = (rank["Bad"]["ended"] for rank in ranks)
    assert "the loss is not finite on one of the devices at step 3. Lower --model.learning_rate" in told
    assert silent == "2"
    for rank in ranks:
        assert len(rank["Bad"]["after"]) == 8, "the host reads a step later"
        assert all(torch.equal(rank["Bad"]["after"][3][name], value) for name, value in rank["Bad"]["last"].items())
    assert read_adapter(tmp_path / "Bad" / "adapter").config["metadata"]["training"]["step"] == 2
