"""A process that prepares batches is killed: the run ends at once with a line, and goes on to the same bits."""

import re
from pathlib import Path

import pytest

from tests.faults.checks import FIT, assert_same, assert_whole, run_of, step_of
from tests.faults.child import run
from tests.faults.faults import KillWorker

WORKERS = ("--data.num_workers", "2")


@pytest.mark.parametrize(("place", "number"), [("training", 9), ("validation", 4)])
def test_lost_worker(tmp_path: Path, undisturbed: Path, place: str, number: int) -> None:
    """Exit code 1, as for any other lost process: nothing that was typed is wrong, and the same again may do."""
    ended = run([*FIT, *WORKERS], tmp_path, KillWorker(place, number))
    folder = run_of(tmp_path)
    assert ended.code == 1, ended
    (line,) = ended.err.strip().splitlines()
    assert re.search(r"process 0 has lost a data loader worker \(.*(Killed|unexpectedly); out of memory\? Try", line)
    assert line.endswith(f"resume with: randlora-pl fit --resume {folder.relative_to(tmp_path)}")
    assert_whole(folder)
    assert step_of(folder) in (4, 6)  # the other worker may have prepared up to four micro-batches more
    ended = run(["fit", "--resume", str(folder.relative_to(tmp_path)), "--data.num_workers", "null"], tmp_path)
    assert ended.code == 0, ended.err
    assert_same(folder, undisturbed)
