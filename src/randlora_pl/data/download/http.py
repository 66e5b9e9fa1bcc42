"""Resumable, verified downloads: ``NAME.part`` is a partial file, ``NAME.origin`` marks a file of this program."""

import hashlib
import http.client
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text.formatting import byte_size
from randlora_pl.utils.version import __version__

TIMEOUT = 15.0
"""Seconds without a byte before a connection counts as dropped."""

RETRIES = 5
"""Consecutive retries without new bytes before giving up."""

PAUSE = 1.0
"""Seconds before the first retry; doubled for each further one."""

ProgressCallback = Callable[[int, int | None], None]
"""Called with (bytes downloaded, total bytes or None)."""

_AGENT = f"randlora-pl/{__version__}"
_CHUNK = 1 << 18
_PASSING = (408, 429, 500, 502, 503, 504)  # temporary errors


class _DroppedError(Exception):
    """The connection was dropped; a retry may resume."""


class _SilentError(_DroppedError):
    """The server is unreachable."""


class _RefusedError(Exception):
    """This source refuses the file; another one may have it."""


def download(
    urls: Sequence[str], target: Path, checksum: str, tick: ProgressCallback = lambda done, total: None
) -> str:
    """Download a file from the first source that has it; a partial file is resumed from any source.

    Args:
        urls: Sources in order of preference.
        target: Destination; it exists only if complete and verified.
        checksum: ``md5:HEX`` or ``sha256:HEX``.
        tick: Progress callback.

    Returns:
        URL of the source used.

    Raises:
        UserError: No source has the file, its checksum is wrong, or the disk is full.
    """
    part = target.with_name(f"{target.name}.part")
    complaints = []
    for url in urls:
        try:
            pieced = _fetch(url, part, tick)
            if (wrong := mismatch(part, checksum)) and pieced:  # the pieces may be of two versions
                part.unlink()
                _fetch(url, part, tick)
                wrong = mismatch(part, checksum)
            if not wrong:
                _marker(target).touch()
                part.replace(target)
                return url
            part.unlink()
            complaints.append(f"the file from {host(url)} is wrong: {wrong}")
        except _RefusedError as error:
            complaints.append(f"{host(url)} {error}")
    raise UserError("; ".join(dict.fromkeys(complaints)))


def mismatch(path: Path, checksum: str, tick: ProgressCallback = lambda done, total: None) -> str:
    """Return a description of a checksum mismatch, or "" for a match or without a checksum."""
    kind, _, expected = checksum.partition(":")
    if not expected:
        return ""
    digest, done, total = hashlib.new(kind, usedforsecurity=False), 0, path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            tick(done, total)
    return "" if digest.hexdigest() == expected else f"its {kind} is {digest.hexdigest()}, expected {expected}"


def length(urls: Sequence[str]) -> int | None:
    """Return Content-Length from the first URL, or None."""
    try:
        request = Request(urls[0], headers={"User-Agent": _AGENT}, method="HEAD")
        with urlopen(request, timeout=TIMEOUT / 3) as answer:
            return int(answer.headers.get("Content-Length", ""))
    except (OSError, ValueError, http.client.HTTPException):
        return None


def fetched(target: Path) -> bool:
    """Return True if this program downloaded the file, not the user."""
    return _marker(target).exists()


def forget(target: Path) -> None:
    """Remove a downloaded file."""
    target.unlink(missing_ok=True)
    _marker(target).unlink(missing_ok=True)


def host(url: str) -> str:
    """Return the server name of a URL for messages."""
    return urlsplit(url).netloc


def _marker(target: Path) -> Path:
    return target.with_name(f"{target.name}.origin")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch(url: str, part: Path, tick: ProgressCallback) -> bool:
    """Retry until the file is complete; return True if several responses were joined.

    Raises:
        _RefusedError: The source refuses the file.
    """
    first, vain = _size(part), 0
    while True:
        before = _size(part)
        try:
            return _attempt(url, part, before, tick)
        except _DroppedError as error:
            if isinstance(error, _SilentError) and before <= first:  # offline: report at once
                raise _RefusedError(f"cannot be reached ({error})") from error
            vain = 0 if _size(part) > before else vain + 1
            if vain > RETRIES:
                raise _RefusedError(f"dropped the connection {RETRIES} times in a row ({error})") from error
            time.sleep(PAUSE * 2 ** max(0, vain - 1))


def _attempt(url: str, part: Path, have: int, tick: ProgressCallback) -> bool:
    """Send one request, for the rest of a partial file if possible; return True if that was used."""
    headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is left to send; the checksum decides
            return True
        kind = _DroppedError if error.code in _PASSING else _RefusedError
        raise kind(f"answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _SilentError(str(getattr(error, "reason", error))) from error
    with answer:
        packed = answer.headers.get("Content-Encoding", "identity").lower()
        # some servers declare every .tar.gz so, but send it unchanged
        if packed not in ("", "identity") and not part.stem.lower().endswith((".gz", ".tgz")):
            raise _RefusedError(f"sends the file compressed ({packed}) despite the request")
        if answer.status == 206:
            if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                part.unlink(missing_ok=True)
                raise _DroppedError("it sent a different range")
        elif answer.headers.get_content_type() == "text/html":  # a login or error page
            raise _RefusedError("sends a web page instead of the file")
        else:
            have = 0
        left = answer.length  # None if the server does not send it
        if left is not None and left > (free := shutil.disk_usage(part.parent).free):
            raise UserError(f"{part.stem} needs {byte_size(left)}, but {part.parent} has {byte_size(free)} free")
        whole = answer.headers.get("Content-Range", "").rpartition("/")[2]  # a proxy may send less than the rest
        total = int(whole) if whole.isdecimal() else None if left is None else have + left
        _receive(answer, have, total, part, tick)
        return have > 0


def _receive(answer: Any, have: int, total: int | None, part: Path, tick: ProgressCallback) -> None:
    """Write the response to the partial file, and check its length."""
    try:
        with part.open("ab" if have else "wb") as file:
            tick(have, total)
            while chunk := _next(answer):
                file.write(chunk)
                have += len(chunk)
                tick(have, total)
    except OSError as error:
        kept = f"the partial file {part.name} is kept; run the command again to resume"
        raise UserError(f"{part} cannot be written ({error.strerror or error}); {kept}") from error
    if total is not None and have < total:
        raise _DroppedError(f"{total - have:,} bytes are missing")


def _next(answer: Any) -> bytes:
    """Return the next bytes of a response, or b"" at its end."""
    try:
        return bytes(answer.read(_CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _DroppedError(str(error) or type(error).__name__) from error
