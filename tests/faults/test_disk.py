"""A disk that is really full, in each kind of write: told in a line, the older files stay, and the run can go on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.checks import FIT, STEPS, assert_whole, finish, run_of, step_of
from tests.faults.child import Ended, run
from tests.faults.faults import Fault, Fill, NoLarge, hidden

PART = "checkpoints/.last.ckpt.part"
BALLAST = "ballast"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def told(ended: Ended, file: str, why: str = "the disk is full") -> None:
    """One line: which file, why, and how to go on."""
    assert ended.code == 2, ended
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("randlora-pl: error: "), line
    assert (
        f"/{file} cannot be written: {why}. Free some space there; " in line
        and "randlora-pl fit --resume runs/" in line
    ), line


PLACES = [
    (f"open {PART}", 3, "checkpoints/last.ckpt", 2),
    ("mkdir .adapter-best.part*", 1, "adapter-best", 2),
    ("mkdir .adapter.part*", 1, "adapter", STEPS),
    ("open .results.json.part", 3, "results.json", STEPS),
    ("open figures/.confusion.png.part", 1, "figures/confusion.png", STEPS),
]
"""Where the disk is full, the file of the message, and the step of the last checkpoint."""


@pytest.mark.parametrize(("where", "number", "file", "step"), PLACES)
def test_full_disk(disk: Path, undisturbed: Path, where: str, number: int, file: str, step: int) -> None:
    ended = run(FIT, disk, Fill(where, number, str(disk / BALLAST), room=100))
    told(ended, file)
    assert_whole(run_of(disk))
    assert hidden(run_of(disk)) == [], "what was begun takes no room"
    assert step_of(run_of(disk)) == step
    (disk / BALLAST).unlink()
    finish(disk, undisturbed)


class EagerBoard(Fault):
    """No fault: TensorBoard's thread writes at once what it would write after two minutes."""

    def install(self) -> None:
        from tensorboard.summary.writer import event_file_writer

        thread: Any = event_file_writer._AsyncWriterThread
        plain = thread.__init__
        thread.__init__ = lambda own, queue, writer, seconds: plain(own, queue, writer, 0.01)


def test_thread_of_tensorboard_that_cannot_write(tmp_path: Path, undisturbed: Path) -> None:
    """In the fifth step, when no checkpoint is due: without a traceback, and what was saved is kept."""
    words = [*FIT, "--trainer.log_every_n_steps", "1"]
    ended = run(words, tmp_path, EagerBoard("training", 0), NoLarge("training", 9, 1000))
    assert ended.code == 2, ended
    (line,) = ended.err.strip().splitlines()
    assert "cannot be written: the file would exceed the size limit. Free some space there; resume with: " in line
    assert step_of(run_of(tmp_path)) == 4
    finish(tmp_path, undisturbed, "--trainer.log_every_n_steps", "2")


@pytest.mark.parametrize(
    ("where", "number"), [("open .results.json.part", 1), ("open .config.yaml.part", 2), ("open .shots.json.part*", 1)]
)
def test_full_disk_before_anything_was_trained(disk: Path, where: str, number: int) -> None:
    """Nothing is kept, so that nothing can be resumed."""
    ended = run(FIT, disk, Fill(where, number, str(disk / BALLAST)))
    assert ended.code == 2 and "written" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
    assert not list(disk.glob("runs/*/*"))


LIMITS = [(f"open {PART}", 2, "checkpoints/last.ckpt"), ("mkdir .adapter-best.part*", 1, "adapter-best")]


@pytest.mark.parametrize(("where", "number", "file"), LIMITS)
def test_file_that_is_larger_than_is_allowed(
    tmp_path: Path, undisturbed: Path, where: str, number: int, file: str
) -> None:
    """As ``ulimit -f`` has it, and quotas of some file systems; needs no right to mount anything."""
    ended = run(FIT, tmp_path, NoLarge(where, number, 400_000))
    told(ended, file, "the file would exceed the size limit")
    assert_whole(run_of(tmp_path))
    finish(tmp_path, undisturbed)
