"""The host waits for a GPU at no time between the fourth and the eighth micro-batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXEMPT = {"token_losses": "transformers reads the padding mask of decoders"}
"""Functions that may wait, and why."""


def test_the_host_never_waits_for_the_device(tmp_path: Path) -> None:
    """Real trainings, with all callbacks, a progress bar and a logger, on a device that only counts.

    What code does on a CPU alone is not counted, because its tensors are of another device than the trained ones.
    """
    pytest.importorskip("torch.utils.backend_registration")
    command = [sys.executable, "-m", "tests.tasks.waits_worker", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 6
    for name, waits in found.items():
        assert [wait for wait in waits if wait.split()[-1] not in EXEMPT] == [], name
