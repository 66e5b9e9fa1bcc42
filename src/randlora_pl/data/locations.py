"""Notations for many files: patterns such as ``train-{000..099}.tar``, URLs, and lists of them.

Imports nothing heavy, because the catalog uses it to distinguish roots from paths.
"""

import glob
import re
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError, errors_in

MOST = 1_000_000
"""Maximum number of files that a pattern may name."""

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


def is_command(location: str) -> bool:
    """Return True for a command of WebDataset's own readers, which is not run here."""
    return location.startswith("pipe:")


def is_pattern(location: str) -> bool:
    """Return True if a location is a pattern for several files."""
    return bool(_BRACES.search(location)) or any(sign in location for sign in "*?[")


def braces(pattern: str) -> list[str]:
    """Expand braces as in a shell: ``{a,b}`` and ``{08..11}``.

    Raises:
        UserError: The pattern has too many expansions.
    """
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
    found: list[str] = []
    for part in parts:
        found += braces(pattern[: match.start()] + part + pattern[match.end() :])
        if len(found) > MOST:
            raise UserError(f"{pattern!r} stands for more than {MOST:,} files")
    return found


def expanded(pattern: str, home: Path | None = None) -> list[str]:
    """Return the locations of a path, a URL or a pattern of either, below ``home`` if relative; sorted for ``*``.

    Raises:
        UserError: Nothing matches, or the pattern is not supported.
    """
    if is_command(pattern):
        raise UserError(f"{pattern!r}: commands are not run; name files or URLs")
    found = []
    for location in braces(pattern):
        if is_url(location):
            if "*" in location:
                raise UserError(f"{location!r}: * works for local files only; write {{000..099}} in a URL")
            found.append(location)
        elif any(sign in location for sign in "*?["):
            matching = sorted(glob.glob(location, root_dir=home))  # noqa: PTH207 (absolute patterns too)
            if not matching:
                raise UserError(f"No file matches {location!r}")
            found += matching if home is None else [str(home / name) for name in matching]
        else:
            found.append(location if home is None else str(home / location))
    return found


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
        here = line if is_url(line) or is_command(line) else str(Path(line).expanduser())
        with errors_in(f"{path}, line {number}"):
            locations += expanded(here, path.parent)
    if not locations:
        raise UserError(f"{path} lists no shards; expected one path, pattern or URL of .tar files per line")
    return locations
