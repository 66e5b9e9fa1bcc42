"""The folder of a sweep: its description, its cells and what state they are in."""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from randlora_pl.sweep.description import SweepConfig
from randlora_pl.sweep.plan import Labels, Trial
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors, parse_json, parse_yaml, write_text
from randlora_pl.utils.lease import holder

DONE, FAILED, OPEN = "done", "failed", "open"

PRUNED = "pruned"
"""First word of the reason why a cell was ended early, which counts as failed."""

TUNE = "tune"
"""Folder of the search of learning rates in the folder of its sweep."""

REPORT = "report"
"""Folder of the report of a sweep in the folder of the sweep, unless another one is typed."""

FIRST = "first"
"""Folder of the LoRA that a cell starts from in the folder of the cell."""
FIRST_SECONDS = "first/fit_seconds"
"""Metric of a cell: training time of the LoRA that it starts from."""


@dataclass
class SweepFolder:
    """Folder of a sweep."""

    path: Path
    file: str = "sweep.yaml"
    _done: dict[str, dict[str, Any]] = field(default_factory=dict)

    def cell_path(self, cell: Trial) -> Path:
        """Return the run folder of a cell."""
        return self.path / "cells" / cell.hash

    def lock(self, cell: Trial) -> Path:
        """Return the lock file of a cell."""
        return self.path / "locks" / f"{cell.hash}.lock"

    def state(self, cell: Trial) -> str:
        """``done``, ``failed`` or ``open``."""
        if self.results(cell):
            return DONE
        return FAILED if (self.cell_path(cell) / "failed.json").is_file() else OPEN

    def results(self, cell: Trial) -> dict[str, Any]:
        """Return the results of a finished cell; empty while it is not finished."""
        if cell.hash not in self._done:
            found = _read(self.cell_path(cell) / "results.json")
            if found.get("finished") is not True:
                return {}
            self._done[cell.hash] = found
        return self._done[cell.hash]

    def failure(self, cell: Trial) -> dict[str, Any]:
        """``reason``, ``time`` and ``tries`` of a cell that failed; empty for any other."""
        return _read(self.cell_path(cell) / "failed.json")

    def worker(self, cell: Trial) -> str:
        """Name the process that runs a cell; empty if none does."""
        return holder(self.lock(cell))

    def begin(self, cell: Trial) -> Path:
        """Make the folder of a cell, with what it is called and what decides its result."""
        labels = cell.labels._asdict() | ({"family": cell.family} if cell.family else {}) | cell.facts
        _write_json(self.cell_path(cell) / "cell.json", labels | {"config": cell.flat})
        return self.cell_path(cell)

    def fail(self, cell: Trial, reason: str, traceback: str = "") -> None:
        """Record that a cell failed, and why."""
        facts: dict[str, Any] = {"reason": " ".join(reason.split()), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        facts |= {"tries": int(self.failure(cell).get("tries", 0)) + 1}
        self.begin(cell)
        _write_json(self.cell_path(cell) / "failed.json", facts | ({"traceback": traceback} if traceback else {}))

    def succeed(self, cell: Trial, keep_adapters: bool) -> None:
        """Remove checkpoints and a former failure of a finished cell, and adapters unless keep_adapters is set."""
        cell_path = self.cell_path(cell)
        for name in ("checkpoints", f"{FIRST}/checkpoints"):
            shutil.rmtree(cell_path / name, ignore_errors=True)
        (cell_path / "failed.json").unlink(missing_ok=True)
        if not keep_adapters:
            for name in ("adapter", "adapter-best", FIRST):
                shutil.rmtree(cell_path / name, ignore_errors=True)

    def open(self, description: SweepConfig, cells: Sequence[Trial]) -> None:
        """Make the folder for a sweep, or extend the grid of the existing one.

        Raises:
            UserError: It holds cells that are called the same and have another config, or something else.
        """
        file = self.path / self.file
        found = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        writing = {name for name in found if name.startswith(f".{self.file}.part")}  # another process begins, too
        if found - writing - {TUNE} and not file.is_file():
            raise UserError(f"{self.path} has no {self.file} and is not empty; name another folder by --output.")
        self.check(cells)
        if file.is_file():
            description = description.union(self.description())
        text = yaml.safe_dump(description.content(), sort_keys=False, allow_unicode=True, width=120)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            _write(file, text)

    def description(self) -> SweepConfig:
        """Return the description of the sweep in the folder.

        Raises:
            UserError: The file is missing, or does not describe a sweep.
        """
        file = self.path / self.file
        try:
            return SweepConfig.from_content(parse_yaml(file.read_text(encoding="utf-8")) or {})
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, UserError) as error:
            raise UserError(f"{file} does not describe a sweep: {' '.join(str(error).split())}") from error

    def check(self, cells: Sequence[Trial]) -> None:
        """Raise a UserError with the differences if cells of the same names have other configs here."""
        planned = {cell.labels: cell for cell in cells}
        hashes = {cell.hash for cell in cells}
        clashes = []
        for file in sorted((self.path / "cells").glob("*/cell.json")):
            if file.parent.name in hashes:
                continue
            entry = _read(file)
            with contextlib.suppress(KeyError, ValueError, TypeError):
                labels = Labels(*(entry[name] for name in Labels._fields))
                same = labels in planned and all(
                    entry.get(key) == value for key, value in planned[labels].facts.items()
                )
                there, here = entry.get("config", {}), planned[labels].flat if same else {}
                names = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
                if same and names:
                    shown = [f"{n} {there.get(n, 'not set')} (here {here.get(n, 'not set')})" for n in names[:3]]
                    clashes.append((labels, file.parent, ", ".join(shown) + " ..." * (len(names) > 3)))
        if clashes:
            labels, cell_path, differs = clashes[0]
            more = f" ({len(clashes)} cells in all)" if len(clashes) > 1 else ""
            raise UserError(
                f"{self.path} holds another sweep: {labels} has {differs} in {cell_path}{more}.\n"
                "Name another --output, or remove those cells; labels that are new here are welcome."
            )


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON mapping; empty where there is none, or a damaged one."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    _write(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    with disk_errors(file, ""):
        write_text(file, text)
