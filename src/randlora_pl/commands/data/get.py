"""``data get``: fetch datasets, or print the manual steps."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from randlora_pl.commands.data.report import SAMPLE, All, Names, check_names, print_reports
from randlora_pl.data.catalog.registry import CATALOG, DatasetSpec, default_root, get_command, how_to_get, present
from randlora_pl.language.dataset_facts import find_images
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.option_types import Root
from randlora_pl.utils.text.formatting import byte_size

if TYPE_CHECKING:
    from randlora_pl.data.check import Report
    from randlora_pl.data.download import ProgressCallback
    from randlora_pl.data.install import DownloadProgress


def get(names: Names = (), *, all: All = False, root: Root = None, keep: bool = False) -> int:
    """Download, verify and unpack datasets, or print the manual steps.

    An interrupted download resumes.

    Examples:
        randlora-pl data get cifar10
        randlora-pl data get --all

    Args:
        keep: Keep the archives in PATH/downloads (default: delete them after the check)

    Returns:
        0 if all requested datasets are there and as expected, else 1. With --all, datasets that only a person can get
        do not count.
    """
    check_names("data get", names, all)
    rows = [find_images(name) for name in dict.fromkeys(names)] or [row for row in CATALOG.values() if row.layout]
    if names and (own := [row.name for row in rows if row.own]):
        raise UserError(
            f"data get: {own[0]} is for your own images, so there is nothing to download. See: randlora-pl datasets"
        )
    folder = default_root() if root is None else Path(root).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--root {folder} is a file; give the folder for the datasets")
    try:
        return _get([row for row in rows if not row.own], folder, keep, all)
    except KeyboardInterrupt as stop:
        again = "--all" if all else " ".join(names)
        where = "" if root is None else f" --root {shlex.quote(root)}"
        raise type(stop)(
            f"download interrupted, partial files are kept. Resume: randlora-pl data get {again}{where}"
        ) from None


def _get(rows: Sequence[DatasetSpec], root: Path, keep: bool, everything: bool) -> int:
    """Fetch one dataset after the other, even if one fails; return the exit code."""
    from randlora_pl.data.install import by_hand, downloads

    reports, got, failed, helpless = [], [], [], []
    for row in rows:
        if not row.layout:
            builtin = f"{row.name}: built in, nothing to download"
            print(builtin if present(row, root) else how_to_get(row, root))
            continue
        there = _check(row, root, 0) if present(row, root) else None
        if there and there.problems:
            print(f"{row.name}: in {root}, but off: {there.problems[0].what}")
        if there and not there.problems:
            print(f"{row.name}: already complete in {root}")
            _tidy(row, root, keep)
        elif by_hand(row, root):
            helpless.append(row)
        else:
            try:
                report = _fetch(row, root)
            except UserError as error:
                failed.append(row)
                print(f"randlora-pl: error: {error}", file=sys.stderr)
                continue
            reports.append(report)
            if report.problems:
                failed.append(row)
            else:
                got.append(row)
                _tidy(row, root, keep)
    if reports:
        print()
        print_reports(reports)
    for row in helpless:
        print(f"\n{row.name} cannot be downloaded by a command; licence: {row.licence}")
        if row.files:
            with suppress(OSError):
                downloads(row, root).mkdir(parents=True, exist_ok=True)
        for line in [*by_hand(row, root), f"then: {get_command(row, root)}"]:
            print(f"  {line}")
    if failed:
        print(f"\nFailed: {', '.join(row.name for row in failed)}. Run the same command again to retry")
    if got:
        where = "" if root == default_root() else f" --data.root {shlex.quote(str(root))}"
        print(f"\nNext: randlora-pl fit --config clip_vitb32 --data.dataset {got[0].name}{where}")
    return 1 if failed or (helpless and not everything) else 0


def _check(row: DatasetSpec, root: Path, sample: int) -> "Report":
    from randlora_pl.data.check import check

    return check(row, root, sample)


def _fetch(row: DatasetSpec, root: Path) -> "Report":
    """Fetch one dataset, check it, and print both steps."""
    from randlora_pl.data import install
    from randlora_pl.data.download import length

    home = install.downloads(row, root)
    print(f"{row.name}: {row.title}; licence: {row.licence}")
    absent = [file for file in row.files if not (home / file.name).exists()]
    sizes: list[int] = []
    for file in absent:
        size = length(file.urls)
        if size is None:  # offline, or the server sends no size: do not wait for the others
            break
        sizes.append(size)
    total = f", {byte_size(sum(sizes))}" if absent and len(sizes) == len(absent) else ""
    count = "1 file" if len(row.files) == 1 else f"{len(row.files)} files"
    print(f"  {count}, {len(absent)} to download{total}: to {home}, unpacked into {root}", flush=True)
    install.get(row, root, _watch())
    return _check(row, root, SAMPLE)


def _tidy(row: DatasetSpec, root: Path, keep: bool) -> None:
    """Remove what was downloaded, now that it is unpacked."""
    from randlora_pl.data.install import downloads, tidy

    if not keep:
        tidy(row, root)
    left = [file.name for file in row.files if (downloads(row, root) / file.name).exists()]
    if left:
        print(f"  no longer needed: {', '.join(left)} in {downloads(row, root)}")


def _watch() -> "DownloadProgress":
    """Return progress that prints finished steps, and on a terminal a bar for the present one."""
    from randlora_pl.data.install import DownloadProgress

    class Printed(DownloadProgress):
        def report(self, text: str) -> None:
            print(f"  {text}", flush=True)

    class Bars(Printed):
        @contextmanager
        def progress(self, text: str) -> "Iterator[ProgressCallback]":
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("  {task.description}"), BarColumn(20), DownloadColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
                task = progress.add_task(text, total=None)
                yield lambda done, total: progress.update(task, completed=done, total=total)

    return Bars() if sys.stderr.isatty() else Printed()
