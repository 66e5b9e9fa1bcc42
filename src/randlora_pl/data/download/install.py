"""From a row of the catalog to its files on this machine: fetched, verified, unpacked aside, moved into place.

Archives wait in ``ROOT/downloads/NAME`` until the data set has been read; a person may put them there, too.
"""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from randlora_pl.data.catalog.registry import get_command, place
from randlora_pl.data.catalog.spec import Archive, Row
from randlora_pl.data.download.archives import is_archive, unpack
from randlora_pl.data.download.http import Tick, download, fetched, forget, host, megabytes, mismatch
from randlora_pl.data.readers.dispatch import SPLITS, read
from randlora_pl.utils.errors import UserError

log = logging.getLogger("randlora_pl")

EVERY = 30.0
"""Seconds between two lines about the same file."""


class Watch:
    """What `get` tells whoever waits for it: a line now and then; this one is silent."""

    def say(self, text: str) -> None:
        """Takes a line about what has been done or begun."""

    def progress(self, text: str) -> AbstractContextManager[Tick]:
        """A function that is told the progress of what ``text`` names."""
        last = time.monotonic()

        def tick(done: int, total: int | None) -> None:
            nonlocal last
            if time.monotonic() - last > EVERY:
                last = time.monotonic()
                self.say(f"{text}, {megabytes(done)}" + ("" if total is None else f" of {megabytes(total)}"))

        return nullcontext(tick)


class Logged(Watch):
    """Tells it to the log."""

    def say(self, text: str) -> None:
        """Logs a line."""
        log.info(text)


def ensure(row: Row, root: Path, watch: Watch | None = None) -> None:
    """Fetches a data set that cannot be read.

    Raises:
        UserError: It cannot be fetched, or cannot be read afterwards.
    """
    if not row.layout or row.own:
        return
    with contextlib.suppress(UserError):
        _read(row, root)
        return
    get(row, root, watch)
    _read(row, root)
    tidy(row, root)


def _read(row: Row, root: Path) -> None:
    for split in SPLITS:
        read(row, root, split)


def get(row: Row, root: Path, watch: Watch | None = None) -> None:
    """Fetches, verifies and unpacks the files of a data set, whether or not it is there.

    Args:
        row: The data set.
        root: Folder of the data sets; it is made if need be.
        watch: Told what happens.

    Raises:
        UserError: A file cannot be had, or is not what it should be. Nothing has been put into place then.
    """
    watch = watch or Watch()
    if by_hand(row, root):
        raise UserError(
            f"{row.name} is not in {root} and cannot be fetched; what to put where: {get_command(row, root)}"
        )
    home = downloads(row, root)
    with _alone(home, row):
        aside = home / "unpacked"
        try:
            for file in row.files:
                _obtain(row, root, file, watch)
            shutil.rmtree(aside, ignore_errors=True)  # what a killed command has left
            for file in row.files:
                _unpack(home / file.name, file, aside, watch)
            _move(aside, root)
            watch.say(f"in place: {place(row, root)}")
        except OSError as error:
            raise UserError(f"{row.name} cannot be put into {root}: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def tidy(row: Row, root: Path) -> None:
    """Removes the archives that were downloaded; what a person has put there stays, and what another command uses."""
    home = downloads(row, root)
    done = [home / file.name for file in row.files if fetched(home / file.name)]
    if done:
        with contextlib.suppress(UserError), _alone(home, row):
            for path in done:
                forget(path)
    for folder in (home, home.parent):
        with contextlib.suppress(OSError):  # there is more in it
            folder.rmdir()


def by_hand(row: Row, root: Path) -> list[str]:
    """What a person must still do before `get` can do the rest, a line for each step."""
    if not row.files:
        return [line.format(root=root) for line in row.by_hand]
    home = downloads(row, root)
    return [
        f"put {file.name} into {home}: {file.page}"
        for file in row.files
        if not file.urls and not (home / file.name).exists()
    ]


def downloads(row: Row, root: Path) -> Path:
    """Where the archives of a data set wait."""
    return root / "downloads" / row.name


_LOCK = ".lock"


@contextmanager
def _alone(home: Path, row: Row) -> Iterator[None]:
    """Keeps a second command from writing the same files; the system ends the lock of a killed one."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        file = (home / _LOCK).open("w")
    except OSError as error:
        raise UserError(f"{home} cannot be written: {error.strerror or error}") from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"Another command is fetching {row.name} into {home}; wait for it") from error
        except OSError as error:
            raise UserError(f"{home / _LOCK} cannot be locked: {error.strerror or error}") from error
        try:
            yield
        finally:
            (home / _LOCK).unlink(missing_ok=True)


def _obtain(row: Row, root: Path, file: Archive, watch: Watch) -> None:
    """Brings one file into `downloads`, or verifies the one that is there."""
    path = downloads(row, root) / file.name
    if path.exists():
        try:
            with watch.progress(f"{file.name}: verifying") as tick:
                wrong = mismatch(path, file.checksum, tick)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        if not wrong:
            watch.say(f"{file.name}: there already, {_verdict(file)}")
            return
        if not fetched(path):  # a person's, who may want to look at it
            raise UserError(f"{path} is not the source's file: {wrong}", f"Remove it, then: {get_command(row, root)}")
        forget(path)
    with watch.progress(f"{file.name}: fetching") as tick:
        try:
            source = download(file.urls, path, file.checksum, tick)
        except UserError as error:
            absent = [other for other in row.files if not (path.parent / other.name).exists()]
            named = ", ".join(f"{other.name} ({other.page or other.urls[0]})" for other in absent)
            raise UserError(
                f"{row.name}: {file.name} could not be fetched: {error}",
                f"By hand: put into {path.parent}: {named}; then: {get_command(row, root)}",
            ) from error
    watch.say(f"{file.name}: {megabytes(path.stat().st_size)} from {host(source)}, {_verdict(file)}")


def _verdict(file: Archive) -> str:
    return f"its {file.checksum.partition(':')[0]} is right" if file.checksum else "no checksum is published"


def _unpack(path: Path, file: Archive, aside: Path, watch: Watch) -> None:
    """Unpacks one file into its folder below ``aside``; one that is no archive is copied there."""
    folder = aside / file.into
    folder.mkdir(parents=True, exist_ok=True)
    if not is_archive(file.name):
        shutil.copyfile(path, folder / file.name)
        return
    if file.inner:
        outer = aside.with_name("outer")
        try:
            shutil.rmtree(outer, ignore_errors=True)
            unpack(path, outer)
            held = outer / file.inner
            if not held.is_file():
                raise UserError(f"{path} does not hold {file.inner}")
            _unpack(held, Archive(held.name, into=file.into, leave=file.leave), aside, watch)
        finally:
            shutil.rmtree(outer, ignore_errors=True)
        return
    with watch.progress(f"{file.name}: unpacking") as tick:
        count = unpack(path, folder, file.leave, tick)
    watch.say(f"{file.name}: unpacked, {count:,} {'file' if count == 1 else 'files'}")


def _move(source: Path, target: Path) -> None:
    """Moves what a folder holds into another; a folder that is not there yet comes as a whole."""
    with os.scandir(source) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            there = target / entry.name
            if entry.is_dir() and there.is_dir():
                _move(Path(entry.path), there)
            elif there.exists() and (entry.is_dir() or there.is_dir()):
                raise UserError(f"{there} is in the way: it is {'a folder' if there.is_dir() else 'no folder'}")
            else:
                shutil.move(entry.path, there)  # a target on another disk may be behind a link
