import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from randlora_pl.sweep.folder import Progress, SweepFolder, Times
from randlora_pl.sweep.loop import Loop
from randlora_pl.sweep.plan import Trial
from randlora_pl.utils.lease import acquired, lease_on
from tests.sweep.grids import cells_of

CELLS = cells_of(seeds=[1, 2])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_of(folder: SweepFolder, stream: io.StringIO) -> Progress:
    return Progress(folder, CELLS, stream)


def finish(folder: SweepFolder, cell: Trial) -> None:
    figures = {"finished": True, "test/acc": 0.5, "cell_seconds": 60.0}
    (folder.begin(cell) / "results.json").write_text(json.dumps(figures))


def test_plain_lines_elsewhere(tmp_path: Path) -> None:
    folder, stream = SweepFolder(tmp_path), io.StringIO()
    progress = progress_of(folder, stream)
    with progress.shown():
        progress.started(CELLS[0])
        finish(folder, CELLS[0])
        progress.ended(CELLS[0])
        folder.fail(CELLS[1], "no luck")
        progress.ended(CELLS[1])
        scores = {"finished": True, "test/pearson": 0.5, "data/metric": "pearson", "cell_seconds": 60.0}
        (folder.begin(CELLS[2]) / "results.json").write_text(json.dumps(scores))
        progress.ended(CELLS[2])
    assert stream.getvalue().splitlines() == [
        "1/4  tiny, digits, 2-shot, RandLoRA-6, seed 1: 50.0 % in 60 s; 3 min left",
        "2/4  tiny, digits, 2-shot, LoRA-4, seed 1: failed: no luck; 2 min left",
        "3/4  tiny, digits, 2-shot, RandLoRA-6, seed 2: pearson 0.500 in 60 s; 60 s left",
    ]


def test_processes_between_two_cells_are_counted_on(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    finish(folder, CELLS[0])
    progress = Progress(folder, CELLS, io.StringIO(), jobs=2)
    assert progress.at_work() == 0 and progress.seconds_left() == pytest.approx(3 * 60 / 2)


def test_a_live_table_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    folder = SweepFolder(tmp_path)
    finish(folder, CELLS[0])
    folder.fail(CELLS[1], "no luck")
    lease = lease_on(folder.lock(CELLS[2]))
    assert acquired(lease)
    stream = Terminal()
    progress = progress_of(folder, stream)
    progress.started(CELLS[3])
    progress.print_line(CELLS[1])
    with progress.shown():
        pass
    lease.release()
    assert "failed: no luck" in stream.getvalue()
    plain = io.StringIO()
    Console(file=plain, width=120).print(progress.page())
    lines = plain.getvalue().splitlines()
    assert lines[1] == "1 done, 2 running, 1 failed, 2 left; 60 s left"
    assert lines[2].startswith(f"> {CELLS[3].labels}, for") and str(CELLS[2].labels) in lines[3]


def test_times_are_of_the_nearest_finished_cells() -> None:
    datasets = {"digits": None, "long": {"dataset": "digits", "steps": 20}}
    cells = cells_of(seeds=[1, 2], budgets=[2, 4], datasets=datasets)
    first, other = cells[:2]  # of two methods
    longer = next(cell for cell in cells if cell.labels[1:4] == ("long", *first.labels[2:4]))
    times = Times()
    assert times.expected(first) is None
    times.add(first, 10.0)
    times.add(longer, 20.0)
    assert [times.expected(cell) for cell in (first, longer, other)] == [10.0, 20.0, 15.0]


@pytest.mark.parametrize("count", [100, 1_000])
def test_progress_is_linear_in_cells(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at cells, at their files and at those who run them, of a whole sweep."""
    cells = [replace(CELLS[0], labels=CELLS[0].labels._replace(seed=n), flat={"n": n}) for n in range(count)]
    folder, calls = SweepFolder(tmp_path), Counter[str]()

    def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return plain(*args)

        return call

    for name in ("state", "worker", "results", "failure"):
        monkeypatch.setattr(folder, name, counted(name, getattr(folder, name)))
    monkeypatch.setattr(Times, "expected", counted("expected", Times.expected))

    def run(cell: Trial, place: Path) -> None:
        (place / "results.json").write_text('{"finished": true, "test/acc": 0.5, "cell_seconds": 1.0}')

    stream = io.StringIO()
    progress = Progress(folder, cells, stream)
    Loop(folder, cells, run, progress, seconds=lambda cell: progress.times.expected(cell) or 0.0).work()
    assert stream.getvalue().count("\n") == count and progress.count() == (count, 0, 0)
    assert max(calls.values()) <= 12 * count, calls
