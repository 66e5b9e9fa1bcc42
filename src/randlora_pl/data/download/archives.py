"""Archives from elsewhere, unpacked without trust: nothing lands outside the folder or grows beyond measure."""

import bz2
import fnmatch
import gzip
import lzma
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

from randlora_pl.data.download.http import Tick
from randlora_pl.utils.errors import UserError

RATIO = 200
"""Unpacked bytes for each packed one beyond which an archive counts as hostile; those of images have 1 to 20."""

FLOOR = 16 << 20
"""Unpacked bytes that any archive may have."""

EACH = 512
"""Bytes that a file counts at least, so that a million empty ones are no way round."""

JUNK = ("__MACOSX/*", "._*", "*/._*", ".DS_Store", "*/.DS_Store")
"""What Macs leave in archives."""

HEADER = 1 << 20
"""Most bytes of a long name or of extended headers in a tar; they are held in memory."""

_TOO_MUCH = f"what it holds is more than {RATIO} times its size"
_CHUNK = 1 << 18
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,  # a compression that Python does not know
    RuntimeError,  # zipfile, for one with a password
    ValueError,
    MemoryError,  # sizes in headers that no machine has
    OverflowError,
)

_HELD = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Kinds of headers whose content tarfile reads at once."""

Member = tuple[str, IO[bytes] | None]
"""A name in an archive and its content, None for a folder."""


def is_archive(name: str) -> bool:
    """Whether a file of this name is unpacked rather than put into place as it is."""
    return name.lower().endswith((".zip", ".gz", ".tar", ".tgz", ".tar.bz2", ".tar.xz"))


def unpack(archive: Path, folder: Path, leave: Sequence[str] = (), tick: Tick = lambda done, total: None) -> int:
    """Unpack a zip, a tar (plain, gz, bz2, xz) or a single gz file; owners, modes and times are not taken over.

    Args:
        archive: The file; its suffix says what it is.
        folder: Where to unpack it to; nobody else may write there.
        leave: Patterns of names that are not unpacked.
        tick: Told how much of the archive has been read.

    Returns:
        How many files were written.

    Raises:
        UserError: The archive is damaged or hostile, or what it holds cannot be written. What was unpacked until then
            is still in the folder.
    """
    count = 0
    try:
        with archive.open("rb") as raw:
            if not archive.stat().st_size:  # to gzip it would be the archive of an empty file
                raise EOFError("it is empty")
            meter = _Meter(archive, raw, tick)
            for name, content in _members(archive, raw):
                path = _inside(archive, name)
                if path == "" or any(fnmatch.fnmatchcase(path, pattern) for pattern in (*JUNK, *leave)):
                    continue
                meter.add(EACH)
                target = folder / path
                if content is None:
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                count += 1
                with target.open("wb") as file:
                    while chunk := content.read(_CHUNK):
                        meter.add(len(chunk))
                        file.write(chunk)
    except _DAMAGED as error:
        raise UserError(f"{archive} is damaged and was not unpacked: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno is None:  # how bz2 says it
            raise UserError(f"{archive} is damaged and was not unpacked: {error}") from error
        raise UserError(f"{archive} cannot be unpacked to {folder}: {error.strerror}") from error
    return count


class _Meter:
    """Counts what comes out of an archive, for headers can lie.

    Attributes:
        most: Bytes that may come.
    """

    def __init__(self, archive: Path, raw: IO[bytes], tick: Tick) -> None:
        self._archive, self._raw, self._tick = archive, raw, tick
        self._size = archive.stat().st_size
        self._left = self.most = max(FLOOR, RATIO * self._size)

    def add(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _hostile(self._archive, _TOO_MUCH)
        self._tick(min(self._raw.tell(), self._size), self._size)


class _Metered:
    """A stream of which every byte is counted, also those that nobody asked for: headers, and what is left out."""

    def __init__(self, stream: Any, meter: _Meter) -> None:
        self._stream, self._meter = stream, meter

    def read(self, count: int) -> bytes:
        content = bytes(self._stream.read(count))
        self._meter.add(len(content))
        return content


def _members(archive: Path, raw: IO[bytes]) -> Iterator[Member]:
    name = archive.name.lower()
    if name.endswith(".zip"):
        yield from _zip(archive, raw)
    elif name.endswith((".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")):
        yield from _tar(archive, raw)
    else:
        with gzip.open(raw) as content:
            yield archive.name[: -len(".gz")], content  # type: ignore[misc]


def _tar(archive: Path, raw: IO[bytes]) -> Iterator[Member]:
    sign = raw.read(6)
    raw.seek(0)
    kinds: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    whole = next((kind(raw) for start, kind in kinds.items() if sign.startswith(start)), raw)
    meter = _Meter(archive, raw, lambda done, total: None)
    last = b""

    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
            nonlocal last
            last = bytes(buf)
            header = super().frombuf(buf, encoding, errors)
            if header.size > meter.most:
                raise _hostile(archive, _TOO_MUCH)
            if header.size < 0 or (header.size > HEADER and header.type in _HELD):
                raise _hostile(archive, f"a header in it claims {header.size:,} bytes")
            return header

    stream: Any = _Metered(whole, meter)
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header) as tar:
        for member in tar:
            if not (member.isreg() or member.isdir()):
                kind = "a link" if member.issym() or member.islnk() else "a device"
                raise _hostile(archive, f"{member.name!r} is {kind}")
            yield member.name, None if member.isdir() else tar.extractfile(member)
        if len(last) < tarfile.BLOCKSIZE or last.strip(b"\0"):  # tarfile stops at anything that is no header
            raise tarfile.ReadError("it has no end mark")
        rest: Any = tar.fileobj
        if rest.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("it goes on after a block of zeros, and two are the end mark")
        rest.read(tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE)  # may be anything, say the standards
        while content := rest.read(_CHUNK):  # to its very end, where gzip has a checksum
            if content.strip(b"\0"):
                raise tarfile.ReadError("it goes on after its end mark")


def _zip(archive: Path, raw: IO[bytes]) -> Iterator[Member]:
    with zipfile.ZipFile(raw) as packed:
        for info in packed.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _hostile(archive, f"{info.filename!r} is {'a link' if stat.S_ISLNK(kind) else 'a device'}")
            if info.is_dir():
                yield info.orig_filename, None
            else:
                with packed.open(info) as content:
                    yield info.orig_filename, content


def _inside(archive: Path, name: str) -> str:
    """A member's path below the folder with forward slashes; empty for the folder itself.

    Raises:
        UserError: It leads elsewhere, on this system or on another.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    drive = any(re.match("[A-Za-z]:", part) for part in parts)
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or drive:
        raise _hostile(archive, f"{name!r} leads out of the folder")
    return "/".join(parts)


def _hostile(archive: Path, why: str) -> UserError:
    return UserError(f"{archive} was refused: {why}")
