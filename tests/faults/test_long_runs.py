"""2,000 optimizer steps with validations and checkpoints: neither memory nor open files nor threads grow."""

import json
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults import child
from tests.faults.child import run
from tests.faults.faults import Fault
from tests.support.cli import SMALL

STEPS, WARM_UP = 2000, 200
LONG = [
    *("fit", *SMALL, "--data.steps", str(STEPS), "--data.batch_size", "2", "--model.adapter", "LoRA"),
    *("--model", "TextHeadTask", "--data.eval_batch_size", "8", "--trainer.val_check_interval", "100"),
    *("--checkpoint.every_n_steps", "50", "--trainer.limit_val_batches", "2"),
]


@dataclass(frozen=True)
class Watch(Fault):
    """No fault: writes after every so many steps what the process holds, as JSON lines in ``watch.txt``."""

    def install(self) -> None:
        from randlora_pl.run.callbacks import RunCheckpoint

        plain, page = RunCheckpoint.on_train_batch_end, os.sysconf("SC_PAGE_SIZE")
        notes = Path("watch.txt").open("a", buffering=1)  # noqa: SIM115

        def noting(callback: RunCheckpoint, trainer: Any, *args: Any) -> None:
            plain(callback, trainer, *args)
            if trainer.global_step % self.number == 0:
                held = {
                    "step": trainer.global_step,
                    "rss": page * int(Path("/proc/self/statm").read_text().split()[1]),
                    "files": len(list(Path("/proc/self/fd").iterdir())),
                    "threads": len(list(Path("/proc/self/task").iterdir())),
                    "processes": len(multiprocessing.active_children()),
                }
                notes.write(f"{json.dumps(held)}\n")

        RunCheckpoint.on_train_batch_end = noting  # type: ignore[method-assign]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(child, "PATIENCE", 1200)
    ended = run([*LONG, "--data.num_workers", str(workers)], tmp_path, Watch("training", 100))
    assert ended.code == 0, ended.err
    held = [json.loads(line) for line in (tmp_path / "watch.txt").read_text().splitlines()]
    assert [row["step"] for row in held] == list(range(100, STEPS + 1, 100))
    warm, *later = [row for row in held if row["step"] >= WARM_UP]
    print(f"RSS {warm['rss'] / 2**20:.1f} MiB after {WARM_UP} steps, most later:", max(r["rss"] for r in later) / 2**20)
    assert max(row["rss"] for row in later) < 1.02 * warm["rss"], [row["rss"] for row in held]
    on_the_way = 2 * 2 * workers  # each worker has two batches ready, and a file is open for each of their two tensors
    for what, more in (("files", on_the_way), ("threads", 0), ("processes", 0)):
        assert max(row[what] for row in later) <= warm[what] + more, [row[what] for row in held]
