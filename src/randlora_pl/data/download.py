"""Resumable, verified downloads, and safe unpacking of untrusted archives.

``NAME.part`` is a partial file, ``NAME.origin`` marks a file of this program. Nothing is unpacked outside the folder or
grows beyond a fixed ratio.
"""

import bz2
import fnmatch
import gzip
import hashlib
import http.client
import lzma
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from randlora_pl.utils import __version__
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import byte_size

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
        checksum: ``md5:HEX`` or ``sha256:HEX``; empty for a file without one.
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
    """Retry until the file is complete or the source refuses it; return True if several responses were joined."""
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
        temporary = error.code in (408, 429, 500, 502, 503, 504)
        kind = _DroppedError if temporary else _RefusedError
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
        done = have
        try:
            with part.open("ab" if have else "wb") as file:
                tick(done, total)
                while chunk := _next(answer):
                    file.write(chunk)
                    done += len(chunk)
                    tick(done, total)
        except OSError as error:
            kept = f"the partial file {part.name} is kept; run the command again to resume"
            raise UserError(f"{part} cannot be written ({error.strerror or error}); {kept}") from error
        if total is not None and done < total:
            raise _DroppedError(f"{total - done:,} bytes are missing")
        return have > 0


def _next(answer: Any) -> bytes:
    try:
        return bytes(answer.read(_CHUNK))
    except (OSError, http.client.HTTPException) as error:
        raise _DroppedError(str(error) or type(error).__name__) from error


RATIO = 200
"""Maximum unpacked bytes per packed byte; archives of images have 1 to 20."""

FLOOR = 16 << 20
"""Unpacked bytes allowed for any archive."""

JUNK = ("__MACOSX/*", "._*", "*/._*", ".DS_Store", "*/.DS_Store")
"""Files that macOS adds to archives."""

_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # an unsupported compression
    RuntimeError,  # zipfile, for one with a password
    ValueError,
    MemoryError,  # impossible sizes in headers
    OverflowError,
)


class HostileError(Exception):
    """The archive contains something that no dataset needs."""


def unpack(
    archive: Path, folder: Path, leave: Sequence[str] = (), tick: ProgressCallback = lambda done, total: None
) -> int:
    """Unpack a zip, a tar (plain, gz, bz2, xz) or a single gz file, without owners, modes and times.

    Args:
        archive: Archive; its suffix is its format.
        folder: Output folder; no other process may write there.
        leave: Patterns of names that are not unpacked.
        tick: Called with the bytes of the archive that have been read, and its size.

    Returns:
        Number of files written.

    Raises:
        UserError: The archive is damaged or hostile, or its content cannot be written. Files unpacked before the
            error remain in the folder.
    """

    def wanted(name: str) -> bool:
        path = PurePosixPath(name).as_posix()
        return not any(fnmatch.fnmatchcase(path, pattern) for pattern in (*JUNK, *leave))

    name, size = archive.name.lower(), archive.stat().st_size
    tars = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
    try:
        with archive.open("rb") as raw:
            if not size:  # gzip reads it as the archive of an empty file
                raise EOFError("it is empty")
            meter = _Meter(raw, size, tick)
            if name.endswith(tars):
                return _tar(meter, folder, wanted)
            if name.endswith(".zip"):
                with zipfile.ZipFile(raw) as packed:
                    members = [info for info in packed.infolist() if wanted(info.filename)]
                    for info in members:
                        meter.add(info.file_size)  # zipfile reads no more than this of a member
                        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                            raise HostileError(f"{info.filename!r} is a link or a device")
                        tarfile.data_filter(tarfile.TarInfo(info.filename), str(folder))
                        packed.extract(info, folder)
                return sum(not info.is_dir() for info in members)
            folder.mkdir(parents=True, exist_ok=True)
            with gzip.open(raw) as stream, (folder / archive.name[: -len(".gz")]).open("wb") as file:
                meter.stream = stream
                while content := meter.read():
                    file.write(content)
            return 1
    except (HostileError, tarfile.FilterError) as error:
        raise UserError(f"{archive} was not unpacked: {error}") from error
    except _DAMAGED as error:
        raise UserError(f"{archive} is damaged and was not unpacked: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2, for a damaged file
            raise UserError(f"{archive} is damaged and was not unpacked: {error}") from error
        raise UserError(f"{archive} cannot be unpacked to {folder}: {error.strerror}") from error


class _Meter:
    """Bounds the bytes that come out of an archive, because headers can lie."""

    def __init__(self, raw: IO[bytes], size: int, tick: ProgressCallback) -> None:
        self.raw, self.count = raw, 0
        self.stream: Any = raw  # everything that is read from it is counted, skipped members and headers too
        self._size, self._tick = size, tick

    def add(self, count: int) -> None:
        self.count += count
        if self.count > max(FLOOR, RATIO * self._size):
            raise HostileError(f"its content is more than {RATIO} times its size")
        self._tick(min(self.raw.tell(), self._size), self._size)

    def read(self, count: int = _CHUNK) -> bytes:
        content = bytes(self.stream.read(count))
        self.add(len(content))
        return content


def _tar(meter: _Meter, folder: Path, wanted: Callable[[str], bool]) -> int:
    sign = meter.raw.read(6)
    meter.raw.seek(0)
    kinds: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    meter.stream = next((kind(meter.raw) for start, kind in kinds.items() if sign.startswith(start)), meter.raw)
    stream: Any = meter
    count = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if not wanted(member.name):
                continue
            # The filter permits links inside the folder, but Python before 3.11.13 can be led outside through them.
            if member.issym() or member.islnk() or member.issparse() or member.size < 0:
                raise HostileError(f"{member.name!r} is a link, a sparse file or has a negative size")
            tar.extract(member, folder, set_attrs=False, filter="data")
            count += member.isreg()
        rest: Any = tar.fileobj  # tarfile stops without an error at a damaged header
        if meter.count < tar.offset + tarfile.BLOCKSIZE or rest.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("it has no end mark")
        rest.read(tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE)  # POSIX allows any content here
        while content := rest.read(_CHUNK):  # to the end, where gzip has a checksum
            if content.strip(b"\0"):
                raise tarfile.ReadError("it has data after its end mark")
    return count
