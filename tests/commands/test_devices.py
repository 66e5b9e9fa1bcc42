"""A whole ``fit`` in two processes, as a user starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import Tree
from tests.data.conftest import tree as tree  # the fixture
from tests.support.products import marked

FIT = (
    *(sys.executable, "-m", "randlora_pl", "fit", "--config", "quickstart", "--trainer.accelerator", "cpu"),
    *("--trainer.devices", "2", "--data.steps", "2", "--data.batch_size", "4", "--data.eval_batch_size", "8"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("kind",), marked(zip(["digits", "folder"]), lambda row: row[0] in ("folder",)))
def test_a_fit_in_two_processes_ends_and_leaves_nothing_behind(tree: Tree, tmp_path: Path, kind: str) -> None:
    words = ["--trainer.limit_test_batches", "2"]
    if kind == "folder":  # its decoded images are shared
        words += ["--data.dataset", "folder", "--data.root", str(tree(cat=16, dog=16)), "--data.num_workers", "1"]
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    own = {"OMP_NUM_THREADS": "1", "RANDLORA_PL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*FIT, *words], cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = tmp_path.glob("runs/quickstart/2*/results.json")
    assert json.loads(results.read_text())["finished"]
    left = {path for path in (set(shared.iterdir()) if shared.is_dir() else set()) - before if "randlora" in path.name}
    assert not left
