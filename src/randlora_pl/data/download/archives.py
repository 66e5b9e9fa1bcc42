"""Safe unpacking of untrusted archives: nothing is written outside the folder or grows beyond a fixed ratio."""

import bz2
import fnmatch
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

from randlora_pl.data.download.http import ProgressCallback
from randlora_pl.utils.errors import UserError

RATIO = 200
"""Maximum unpacked bytes per packed byte; archives of images have 1 to 20."""

FLOOR = 16 << 20
"""Unpacked bytes allowed for any archive."""

JUNK = ("__MACOSX/*", "._*", "*/._*", ".DS_Store", "*/.DS_Store")
"""Files that macOS adds to archives."""

_CHUNK = 1 << 18
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

Wanted = Callable[[str], bool]


class HostileError(Exception):
    """The archive contains something that no dataset needs."""


def is_archive(name: str) -> bool:
    """Return True if a file with this name is unpacked instead of copied."""
    return name.lower().endswith((".zip", ".gz", ".tar", ".tgz", ".tar.bz2", ".tar.xz"))


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
    kind = _zip if name.endswith(".zip") else _tar if name.endswith(tars) else _gzip
    try:
        with archive.open("rb") as raw:
            if not size:  # gzip reads it as the archive of an empty file
                raise EOFError("it is empty")
            return kind(_Meter(raw, size, tick), folder, wanted)
    except (HostileError, tarfile.FilterError) as error:
        raise UserError(f"{archive} was refused: {error}") from error
    except _DAMAGED as error:
        raise UserError(f"{archive} is damaged and was not unpacked: {error or type(error).__name__}") from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2, for a damaged file
            raise UserError(f"{archive} is damaged and was not unpacked: {error}") from error
        raise UserError(f"{archive} cannot be unpacked to {folder}: {error.strerror}") from error


class _Meter:
    """Bounds the bytes that come out of an archive, because headers can lie.

    Attributes:
        raw: The open archive.
        name: Its file name.
        count: Bytes that came out of it.
    """

    def __init__(self, raw: IO[bytes], size: int, tick: ProgressCallback) -> None:
        self.raw, self.name, self.count = raw, Path(raw.name).name, 0
        self._size, self._tick, self._stream = size, tick, raw

    def add(self, count: int) -> None:
        self.count += count
        if self.count > max(FLOOR, RATIO * self._size):
            raise HostileError(f"its content is more than {RATIO} times its size")
        self._tick(min(self.raw.tell(), self._size), self._size)

    def over(self, stream: Any) -> "_Meter":
        """Count everything that is read from a stream, skipped members and headers too."""
        self._stream = stream
        return self

    def read(self, count: int = _CHUNK) -> bytes:
        content = bytes(self._stream.read(count))
        self.add(len(content))
        return content


def _gzip(meter: _Meter, folder: Path, wanted: Wanted) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(meter.raw) as stream, (folder / meter.name[: -len(".gz")]).open("wb") as file:
        meter.over(stream)
        while content := meter.read():
            file.write(content)
    return 1


def _tar(meter: _Meter, folder: Path, wanted: Wanted) -> int:
    sign = meter.raw.read(6)
    meter.raw.seek(0)
    kinds: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
    stream: Any = meter.over(
        next((kind(meter.raw) for start, kind in kinds.items() if sign.startswith(start)), meter.raw)
    )
    count = 0
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if not wanted(member.name):
                continue
            # The filter permits links inside the folder, but Python before 3.11.13 can be led outside through them.
            if member.issym() or member.islnk() or member.issparse() or member.size < 0:
                raise HostileError(f"{member.name!r} is a link, a sparse file or of negative size")
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


def _zip(meter: _Meter, folder: Path, wanted: Wanted) -> int:
    with zipfile.ZipFile(meter.raw) as packed:
        members = [info for info in packed.infolist() if wanted(info.filename)]
        for info in members:
            meter.add(info.file_size)  # zipfile reads no more than this of a member
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise HostileError(f"{info.filename!r} is a link or a device")
            tarfile.data_filter(tarfile.TarInfo(info.filename), str(folder))
            packed.extract(info, folder)
    return sum(not info.is_dir() for info in members)
