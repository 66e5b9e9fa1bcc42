"""How places of many files are written: patterns such as ``train-{000..099}.tar``, URLs, and lists of them.

Imports nothing heavy: the catalog asks here whether a root is a path.
"""

import glob
import re
from pathlib import Path
from typing import Any

from randlora_pl.utils.errors import UserError, errors_in

MOST = 1_000_000
"""Most places that a pattern may name."""

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


_Native: Any = type(Path())


class _Url(_Native):  # type: ignore[misc]
    """A URL where a path is expected. `Path` alone drops the second of two slashes, also in signatures."""

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
        """What paths derived from it are (since Python 3.12): no URLs."""
        return Path(*parts)


def root_of(typed: str) -> Path:
    """A root that was typed: a path, a pattern or a URL."""
    return _Url(typed) if is_url(typed) else Path(typed).expanduser()


def spelled(root: Path) -> str:
    """A root as it was typed: `Path` makes ``https:/host`` of ``https://host``."""
    return re.sub(r"^([a-z][a-z0-9+]+):/+", r"\1://", root.as_posix())


def is_url(place: str) -> bool:
    """Whether a place is not a path of this machine."""
    return "://" in place


def bare(place: str) -> str:
    """A place without the query of a URL, in which signatures have slashes and dots of their own."""
    return re.split("[?#]", place, maxsplit=1)[0] if is_url(place) else place


def is_command(place: str) -> bool:
    """Whether a place is a command for WebDataset's own readers, which is not run here."""
    return place.startswith("pipe:")


def is_pattern(place: str) -> bool:
    """Whether a place stands for several."""
    return bool(_BRACES.search(place)) or any(sign in place for sign in "*?[")


def braces(pattern: str) -> list[str]:
    """What a pattern with braces stands for, as in a shell: ``{a,b}`` and ``{08..11}``.

    Raises:
        UserError: It stands for too many.
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
        zeros = any(number != "0" and number.startswith("0") for number in (first, last))
        width = max(len(first), len(last)) if zeros else 0
        step = 1 if begin <= end else -1
        parts = [f"{number:0{width}d}" for number in range(begin, end + step, step)]
    found: list[str] = []
    for part in parts:
        found += braces(pattern[: match.start()] + part + pattern[match.end() :])
        if len(found) > MOST:
            raise UserError(f"{pattern!r} stands for more than {MOST:,} files")
    return found


def expanded(pattern: str, home: Path | None = None) -> list[str]:
    """The places that a path, a URL or a pattern of either names; those of ``*`` sorted.

    Args:
        pattern: It.
        home: Folder that paths are relative to, whose name is no pattern.

    Raises:
        UserError: Nothing matches, or it cannot be matched.
    """
    if is_command(pattern):
        raise UserError(f"{pattern!r}: commands are not run; name files or URLs")
    found = []
    for place in braces(pattern):
        if is_url(place):
            if "*" in place:
                raise UserError(f"{place!r}: * works for files of this machine only; write {{000..099}} in a URL")
            found.append(place)
        elif any(sign in place for sign in "*?["):
            matching = sorted(glob.glob(place, root_dir=home))  # noqa: PTH207 (absolute patterns too)
            if not matching:
                raise UserError(f"No file matches {place!r}")
            found += [_below(home, name) for name in matching]
        else:
            found.append(_below(home, place))
    return found


def _below(home: Path | None, place: str) -> str:
    return place if home is None else str(home / place)


def listed(path: Path) -> list[str]:
    """The places that a text file names: a path, pattern or URL a line; paths are relative to the file.

    Raises:
        UserError: It cannot be read, is empty, or a line matches nothing.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is neither a .tar file nor a text file that lists some: {error}") from error
    places = []
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        here = line if is_url(line) or is_command(line) else str(Path(line).expanduser())
        with errors_in(f"{path}, line {number}"):
            places += expanded(here, path.parent)
    if not places:
        raise UserError(f"{path} lists no shards; expected a path, pattern or URL of .tar files a line")
    return places
