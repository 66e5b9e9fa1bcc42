"""Installation of datasets: download, verify, unpack to a temporary folder, move to the root.

Archives are in ``ROOT/downloads/NAME`` until the dataset has been read; the user may put them there as well.
"""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from randlora_pl.data.catalog import Archive, DatasetSpec, dataset_path, get_command
from randlora_pl.data.download import ProgressCallback, download, fetched, forget, host, mismatch, unpack
from randlora_pl.data.readers import SPLITS, read
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import disk_errors
from randlora_pl.utils.text import byte_size

log = logging.getLogger("randlora_pl")

EVERY = 30.0
"""Seconds between two progress lines of one file."""


class DownloadProgress:
    """Progress callbacks of `get`; this base class logs."""

    def report(self, text: str) -> None:
        """Report one line about a finished or started step."""
        log.info(text)

    def progress(self, text: str) -> AbstractContextManager[ProgressCallback]:
        """Return a context with a progress callback for the step in ``text``."""
        last = time.monotonic()

        def tick(done: int, total: int | None) -> None:
            nonlocal last
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                self.report(f"{text}, {byte_size(done)}" + ("" if total is None else f" of {byte_size(total)}"))

        return nullcontext(tick)


def ensure(row: DatasetSpec, root: Path) -> None:
    """Download a dataset if it cannot be read.

    Raises:
        UserError: The download failed, or the dataset cannot be read afterwards.
    """
    if not row.layout or row.own:
        return
    with contextlib.suppress(UserError):
        _read(row, root)
        return
    get(row, root, DownloadProgress())
    _read(row, root)
    tidy(row, root)


def _read(row: DatasetSpec, root: Path) -> None:
    for split in SPLITS:
        read(row, root, split)


def get(row: DatasetSpec, root: Path, watch: DownloadProgress) -> None:
    """Download, verify and unpack the files of a dataset to the folder of datasets, even if it exists.

    Raises:
        UserError: A file is not available or wrong. Nothing is installed.
    """
    if by_hand(row, root):
        raise UserError(
            f"{row.name} is not in {root} and cannot be downloaded automatically. "
            f"For the steps, run: {get_command(row, root)}"
        )
    home = downloads(row, root)
    with _alone(home, row):
        aside = home / "unpacked"
        try:
            for file in row.files:
                _obtain(row, root, file, watch)
            shutil.rmtree(aside, ignore_errors=True)  # left by a killed command
            for file in row.files:
                _unpack(home / file.name, file, aside, watch)
            _move(aside, root)
            watch.report(f"installed: {dataset_path(row, root)}")
        except OSError as error:
            raise UserError(f"{row.name} cannot be installed in {root}: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def tidy(row: DatasetSpec, root: Path) -> None:
    """Remove downloaded archives; keep the user's own and those in use by another command."""
    home = downloads(row, root)
    done = [home / file.name for file in row.files if fetched(home / file.name)]
    if done:
        with contextlib.suppress(UserError), _alone(home, row):
            for path in done:
                forget(path)
    for folder in (home, home.parent):
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def by_hand(row: DatasetSpec, root: Path) -> list[str]:
    """Return the remaining manual steps before `get` can run, one line each."""
    if not row.files:
        return [line.format(root=root) for line in row.by_hand]
    home = downloads(row, root)
    return [
        f"put {file.name} into {home}: {file.page}"
        for file in row.files
        if not file.urls and not (home / file.name).exists()
    ]


def downloads(row: DatasetSpec, root: Path) -> Path:
    """Return the folder of a dataset's archives."""
    return root / "downloads" / row.name


@contextmanager
def _alone(home: Path, row: DatasetSpec) -> Iterator[None]:
    """Lock the folder against a second command; the system releases the lock of a killed one."""
    lock = FileLock(home / ".lock")
    with disk_errors(home, ""):
        home.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(f"Another command is downloading {row.name} to {home}. Wait until it ends") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _obtain(row: DatasetSpec, root: Path, file: Archive, watch: DownloadProgress) -> None:
    path = downloads(row, root) / file.name
    verdict = f"its {file.checksum.partition(':')[0]} is correct" if file.checksum else "no checksum is published"
    if path.exists():
        with watch.progress(f"{file.name}: verifying") as tick:
            wrong = mismatch(path, file.checksum, tick)
        if not wrong:
            watch.report(f"{file.name}: already downloaded, {verdict}")
            return
        if not fetched(path):  # the user's own file is not deleted
            raise UserError(f"{path} is not the published file: {wrong}", f"Remove it, then: {get_command(row, root)}")
        forget(path)
    with watch.progress(f"{file.name}: downloading") as tick:
        try:
            source = download(file.urls, path, file.checksum, tick)
        except UserError as error:
            absent = [other for other in row.files if not (path.parent / other.name).exists()]
            named = ", ".join(f"{other.name} ({other.page or other.urls[0]})" for other in absent)
            raise UserError(
                f"{row.name}: {file.name} could not be downloaded: {error}",
                f"By hand: put into {path.parent}: {named}; then: {get_command(row, root)}",
            ) from error
    watch.report(f"{file.name}: {byte_size(path.stat().st_size)} from {host(source)}, {verdict}")


def _unpack(path: Path, file: Archive, aside: Path, watch: DownloadProgress) -> None:
    """Unpack one file into its folder below ``aside``; copy it if it is not an archive."""
    folder = aside / file.into
    folder.mkdir(parents=True, exist_ok=True)
    if not file.name.lower().endswith((".zip", ".gz", ".tar", ".tgz", ".tar.bz2", ".tar.xz")):
        shutil.copyfile(path, folder / file.name)
        return
    if file.inner:
        outer = aside.with_name("outer")
        try:
            shutil.rmtree(outer, ignore_errors=True)
            unpack(path, outer)
            held = outer / file.inner
            if not held.is_file():
                raise UserError(f"{path} does not contain {file.inner}")
            _unpack(held, Archive(held.name, into=file.into, leave=file.leave), aside, watch)
        finally:
            shutil.rmtree(outer, ignore_errors=True)
        return
    with watch.progress(f"{file.name}: unpacking") as tick:
        count = unpack(path, folder, file.leave, tick)
    watch.report(f"{file.name}: unpacked, {count:,} {'file' if count == 1 else 'files'}")


def _move(source: Path, target: Path) -> None:
    """Move a folder's contents into another folder; a missing folder is moved completely."""
    with os.scandir(source) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            there = target / entry.name
            if entry.is_dir() and there.is_dir():
                _move(Path(entry.path), there)
            elif there.exists() and (entry.is_dir() or there.is_dir()):
                raise UserError(
                    f"cannot write {there}: a {'folder' if there.is_dir() else 'file'} with this name exists"
                )
            else:
                shutil.move(entry.path, there)  # shutil: the target may be on another disk
