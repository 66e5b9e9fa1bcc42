"""Locations of files: patterns such as ``train-{000..099}.tar``, URLs, lists of them, and reads of byte ranges.

Imports nothing heavy, because the catalog uses it to distinguish roots from paths.
"""

import glob
import json
import re
import time
import zlib
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError, errors_in
from randlora_pl.utils.files import open_plain

MOST = 1_000_000
"""Maximum number of files that a pattern may name."""

TRIES = 3
"""Attempts to read a remote file before a run fails."""

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


_Native: Any = type(Path())


class _Url(_Native):  # type: ignore[misc]
    """URL used as a path. `Path` alone would drop the second of two slashes, also in signatures."""

    typed: str

    def __new__(cls, typed: str) -> "_Url":
        self: _Url = super().__new__(cls, typed)
        self.typed = typed
        return self

    def __str__(self) -> str:
        return self.typed

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return _Url, (self.typed,)

    def with_segments(self, *parts: str) -> Path:
        """Return derived paths (since Python 3.12) as plain paths."""
        return Path(*parts)


def root_of(typed: str) -> Path:
    """Return a root from user input: a path, a pattern or a URL."""
    return _Url(typed) if is_url(typed) else Path(typed).expanduser()


def as_typed(root: Path) -> str:
    """Return a root as the user typed it: `Path` changes ``https://host`` to ``https:/host``."""
    return re.sub(r"^([a-z][a-z0-9+]+):/+", r"\1://", root.as_posix())


def is_url(location: str) -> bool:
    """Return True if a location is a URL instead of a local path."""
    return "://" in location


def without_query(location: str) -> str:
    """Remove the query of a URL, because signatures contain slashes and dots."""
    return re.split("[?#]", location, maxsplit=1)[0] if is_url(location) else location


def is_pattern(location: str) -> bool:
    """Return True if a location is a pattern for several files."""
    return bool(_BRACES.search(location)) or any(sign in location for sign in "*?[")


def names_files(location: str) -> bool:
    """Return True if a location is a pattern or a URL, and so need not exist."""
    return is_url(location) or is_pattern(location)


def _braces(pattern: str) -> list[str]:
    """Expand braces as in a shell: ``{a,b}`` and ``{08..11}``; refuse too many."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, choices = match.groups()
    if choices is not None:
        parts = choices.split(",")
    else:
        begin, end = int(first), int(last)
        if abs(end - begin) >= MOST:
            raise UserError(f"{pattern!r} stands for more than {MOST:,} files")
        width = max(map(len, (first, last))) if any(re.match("0.", number) for number in (first, last)) else 0
        step = 1 if begin <= end else -1
        parts = [f"{number:0{width}d}" for number in range(begin, end + step, step)]
    names: list[str] = []
    for part in parts:
        names += _braces(pattern[: match.start()] + part + pattern[match.end() :])
        if len(names) > MOST:
            raise UserError(f"{pattern!r} stands for more than {MOST:,} files")
    return names


def expanded(pattern: str, home: Path | None = None) -> list[str]:
    """Return the locations of a path, a URL or a pattern of either, below ``home`` if relative; sorted for ``*``.

    Raises:
        UserError: Nothing matches, or the pattern is not supported.
    """
    locations = []
    for location in _braces(pattern):
        if is_url(location):
            if "*" in location:
                raise UserError(f"{location!r}: * works for local files only; write {{000..099}} in a URL")
            locations.append(location)
        elif any(sign in location for sign in "*?["):
            matching = sorted(glob.glob(location, root_dir=home))  # noqa: PTH207 (absolute patterns too)
            if not matching:
                raise UserError(f"No file matches {location!r}")
            locations += matching if home is None else [str(home / name) for name in matching]
        else:
            locations.append(location if home is None else str(home / location))
    return locations


def listed(path: Path) -> list[str]:
    """Return the locations listed in a text file: one path, pattern or URL per line, relative to the file.

    Raises:
        UserError: The file cannot be read or is empty, or a line matches nothing.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is neither a .tar file nor a text file that lists some: {error}") from error
    locations = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        here = line if is_url(line) else str(Path(line).expanduser())
        with errors_in(f"{path}, line {number}"):
            locations += expanded(here, path.parent)
    if not locations:
        raise UserError(f"{path} lists no shards; expected one path, pattern or URL of .tar files per line")
    return locations


def remote(url: str) -> tuple[Any, str]:
    """Return (fsspec's file system, path in it) of a URL; called in each process, because connections do not fork."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error} (s3://: pip install s3fs; gs://: pip install gcsfs)") from error
    return system, path


def state_of_url(url: str) -> tuple[int, int, int]:
    """Return the state of a remote file: a hash of the server's version marks, 0, and its size.

    The hash is 0 without marks: a changed file of the same size would look unchanged.
    """
    system, path = remote(url)
    try:
        about = system.info(path)
    except Exception as error:
        raise unreadable(url, error) from error
    marks = {key: str(about[key]) for key in sorted(about) if re.search("etag|modified|mtime|md5|digest", key, re.I)}
    mark = zlib.crc32(json.dumps(marks, sort_keys=True).encode()) if marks else 0
    return mark, 0, int(about.get("size") or 0)


def unreadable(location: str, error: BaseException) -> UserError:
    """Return the error for an unreadable file."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec raises it for every failure
        error = error.__cause__
    gone = isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)
    why = "it does not exist" if gone else getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return UserError(f"The shard {location} cannot be read: {why}")


def read_range(location: str, offset: int, length: int) -> bytes:
    """Read ``length`` bytes of a file from ``offset``; broken connections are tried again.

    Raises:
        UserError: The file cannot be read, or has become shorter.
    """
    system, path = remote(location) if is_url(location) else (None, location)
    for again in range(1, TRIES + 1):
        try:
            if system is not None:
                content: bytes = system.cat_file(path, start=offset, end=offset + length)
                break
            with open_plain(path) as stream:  # opening takes 15 us, decoding an image 1,000
                stream.seek(offset)
                content = stream.read(length)
                break
        except Exception as error:
            if system is None or isinstance(error, FileNotFoundError) or again == TRIES:
                raise unreadable(location, error) from error
            time.sleep(again)
    if len(content) < length:
        raise UserError(f"The shard {location} has changed during use: it ends before byte {offset + length:,}")
    if len(content) > length:
        raise UserError(f"The server of {location} does not support range requests. Copy the shards to this machine")
    return content
