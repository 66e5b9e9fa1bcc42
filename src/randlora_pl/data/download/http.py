"""Resumable, verified downloads.

Partial downloads are in ``NAME.part``, their URL and ETag in ``NAME.origin``; a file ``NAME`` is complete.
"""

import contextlib
import hashlib
import http.client
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.documents import parse_json
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
    urls: Sequence[str], target: Path, checksum: str = "", tick: ProgressCallback = lambda done, total: None
) -> str:
    """Download a file from the first source that has it.

    Args:
        urls: Sources in order of preference; the source of a partial download comes first.
        target: Destination; it exists only if complete and verified.
        checksum: ``md5:HEX`` or ``sha256:HEX``, or empty.
        tick: Progress callback.

    Returns:
        URL of the source used.

    Raises:
        UserError: No source has the file, its checksum is wrong, or the disk is full.
    """
    part = _Part(target)
    complaints = []
    for url in sorted(urls, key=lambda url: url != part.origin.get("url")):
        try:
            pieced = _fetch(url, part, checksum, tick)
            if (wrong := mismatch(part.path, checksum)) and pieced:  # the partial file may have been another version
                part.remove()
                _fetch(url, part, checksum, tick)
                wrong = mismatch(part.path, checksum)
            if not wrong:
                part.path.replace(target)
                return url
            part.remove()
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
            return _number(answer.headers.get("Content-Length"))
    except (OSError, ValueError, http.client.HTTPException):
        return None


def fetched(target: Path) -> bool:
    """Return True if this program downloaded the file, not the user."""
    return _Part(target).note.exists()


def forget(target: Path) -> None:
    """Remove a file and its partial download."""
    _Part(target).remove()
    target.unlink(missing_ok=True)


def host(url: str) -> str:
    """Return the server name of a URL for messages."""
    return urlsplit(url).netloc


class _Part:
    """Partial download of a file; its note has ``url`` and ``validator`` (ETag or Last-Modified)."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f"{target.name}.part")
        self.note = target.with_name(f"{target.name}.origin")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def origin(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            noted = parse_json(self.note.read_text(encoding="utf-8"))
            return noted if isinstance(noted, dict) else {}
        return {}

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)


def _fetch(url: str, part: _Part, checksum: str, tick: ProgressCallback) -> bool:
    """Retry until the file is complete; return True if several responses were joined.

    Raises:
        _RefusedError: The source refuses the file.
    """
    first, vain = part.size, 0
    while True:
        before = part.size
        try:
            return _attempt(url, part, bool(checksum), tick)
        except _DroppedError as error:
            if isinstance(error, _SilentError) and before <= first:  # offline: report at once
                raise _RefusedError(f"cannot be reached ({error})") from error
            vain = 0 if part.size > before else vain + 1
            if vain > RETRIES:
                raise _RefusedError(f"dropped the connection {RETRIES} times in a row ({error})") from error
            time.sleep(PAUSE * 2 ** max(0, vain - 1))


def _attempt(url: str, part: _Part, checked: bool, tick: ProgressCallback) -> bool:
    """Send one request, for the rest of a partial file if possible; return True if that was used."""
    origin = part.origin
    validator = origin.get("validator") or ""
    have = part.size if origin.get("url") == url and (validator or checked) else 0
    headers = {"User-Agent": _AGENT, "Accept-Encoding": "identity"}
    if have:  # with a validator, the server sends a changed file completely
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    try:
        answer = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing is left to send
            if checked or (error.headers.get("Content-Range") or "").endswith(f"/{have}"):
                return True
            part.remove()
            raise _DroppedError("the file has changed") from error
        kind = _DroppedError if error.code in _PASSING else _RefusedError
        raise kind(f"answers {error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _SilentError(str(getattr(error, "reason", error))) from error
    with answer:
        total = _number(answer.headers.get("Content-Length"))
        packed = answer.headers.get("Content-Encoding", "identity").lower()
        # some servers declare every .tar.gz so, but send it unchanged
        if packed not in ("", "identity") and not part.target.name.lower().endswith((".gz", ".tgz")):
            raise _RefusedError(f"sends the file compressed ({packed}) despite the request")
        if answer.status == 206:
            sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not have or sent is None or int(sent[1]) != have:
                part.remove()
                raise _DroppedError("it sent a different range")
            total = _number(sent[2]) or (None if total is None else have + total)
        elif answer.headers.get_content_type() == "text/html":  # a login or error page
            raise _RefusedError("sends a web page instead of the file")
        else:
            have = 0
        if total is not None and total - have > (free := shutil.disk_usage(part.path.parent).free):
            raise UserError(
                f"{part.target.name} needs {byte_size(total - have)}, but {part.path.parent} has {byte_size(free)} free"
            )
        _receive(answer, have, total, part, url, tick)
        return have > 0


def _receive(answer: Any, have: int, total: int | None, part: _Part, url: str, tick: ProgressCallback) -> None:
    """Write the response to the partial file, and check its length."""
    tag = answer.headers.get("ETag") or ""
    validator = tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified") or ""
    try:
        with part.path.open("ab" if have else "wb") as file:
            part.note.write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")
            tick(have, total)
            while chunk := _next(answer):
                file.write(chunk)
                have += len(chunk)
                tick(have, total)
    except OSError as error:
        kept = f"the partial file {part.path.name} is kept; run the command again to resume"
        raise UserError(f"{part.path} cannot be written ({error.strerror or error}); {kept}") from error
    if total is not None and have < total:
        raise _DroppedError(f"{total - have:,} bytes are missing")


def _next(answer: Any) -> bytes:
    """Return the next bytes of a response, or b"" at its end."""
    try:
        return bytes(answer.read(_CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _DroppedError(str(error) or type(error).__name__) from error


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
