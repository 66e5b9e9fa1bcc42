"""Uncompressed tar files of images, local or at a URL: their contents, and reads of byte ranges."""

import json
import os
import re
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from randlora_pl.data.images.decode import SUFFIXES
from randlora_pl.data.locations import is_url
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files.documents import parse_json
from randlora_pl.utils.files.plain_files import open_plain

KEEP_OPEN = 64
"""Maximum number of local files that a process keeps open."""

TRIES = 3
"""Attempts to read a remote file before a run fails."""

LABEL_BYTES = 2**20
"""Maximum bytes of a label file."""

PADDING = 2**20
"""Maximum bytes of zeros at the end of a file without a warning; tar pads to 10,240 bytes, or as set by -b."""

_READ_AHEAD = 2**22
_CHUNK = 2**18
_LABELS = ("cls", "json")
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True)
class Sample:
    """Image in a tar file.

    Attributes:
        member: Member name of the image.
        offset: First byte in the file.
        length: Number of bytes.
        label: Class number or name from the file.
    """

    member: str
    offset: int
    length: int
    label: str


@dataclass
class _Members:
    """Files of one sample: (name, offset, length) by suffix, and the contents of label files."""

    files: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    words: dict[str, bytes] = field(default_factory=dict)


def scan(shard: str) -> tuple[list[Sample], str]:
    """Return the samples of a tar file in file order, and a warning or "".

    Files with the same name up to the first dot of the last part are one sample, as in WebDataset.

    Raises:
        UserError: The file is missing, compressed or damaged, or a sample is incomplete or repeated.
    """
    groups: dict[str, _Members] = {}
    with opened(shard) as stream:
        for name, offset, length in _files(shard, stream):
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem or folder.startswith("__"):  # hidden files; __MACOSX
                continue
            suffix = suffix.lower()
            sample = groups.setdefault(f"{folder}/{stem}" if folder else stem, _Members())
            if suffix in sample.files:
                raise UserError(f"{shard}: the member {name!r} is repeated, the second is at byte {offset:,}")
            sample.files[suffix] = (name, offset, length)
            if suffix in _LABELS and length <= LABEL_BYTES:
                stream.seek(offset)
                sample.words[suffix] = stream.read(length)
        remark = _ending(shard, stream)
    samples = [_sample(shard, key, members) for key, members in groups.items()]
    return sorted(samples, key=lambda sample: sample.offset), remark


def _files(shard: str, stream: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, length) of regular files in a tar file; the stream then is at the end mark.

    Raises:
        UserError: The file is compressed, truncated or not a tar file, or a member is sparse.
    """
    head = stream.read(6)
    for sign, remedy in _COMPRESSED.items():
        if head.startswith(sign):
            raise UserError(f"{shard} is compressed, so its members cannot be read individually. Run {remedy} first")
    stream.seek(0)
    last = ""
    begin = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise all are kept in memory
                last, begin = info.name, info.offset
                if info.issparse():
                    raise UserError(
                        f"{shard}: the member {last!r} is sparse, so it is not contiguous. Write the shard "
                        "without tar's option --sparse"
                    )
                if info.isreg():
                    yield info.name.removeprefix("./"), info.offset_data, info.size
            end = tar.offset
    except tarfile.ReadError as error:
        if last:
            where = f"within the member {last!r} that begins at byte {begin:,}"
            raise UserError(f"The shard {shard} is cut off {where} ({error}). Copy or write it again") from error
        raise UserError(f"{shard} is not a tar file ({error})") from error
    stream.seek(end)


def _ending(shard: str, stream: IO[bytes]) -> str:
    """Return a warning about the end of the file, or "".

    The rest must be zeros: tarfile takes the first block of zeros as the end, but it may be a hole in an incomplete
    copy, or the end of the first of several concatenated files.

    Raises:
        UserError: The rest has non-zero bytes.
    """
    where = stream.tell()
    mark = stream.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise UserError(f"The shard {shard} is damaged at byte {where:,}. Copy or write it again")
    zeros = len(mark)
    while rest := stream.read(_CHUNK):
        something = rest.lstrip(b"\0")
        zeros += len(rest) - len(something)
        if something:
            raise UserError(
                f"The shard {shard} has an end mark at byte {where:,}, but more data at byte {where + zeros:,}: it is "
                "damaged, or several files were concatenated (use tar -A)"
            )
    if zeros > PADDING:
        return f"{shard} has only zeros after byte {where:,}, {zeros:,} of them. Check that the copy is complete"
    return "" if mark else f"{shard} has no end mark: it may have been cut off at byte {where:,}"


def _sample(shard: str, key: str, members: _Members) -> Sample:
    """Return the image and label of a sample's files.

    Raises:
        UserError: The image or the label is missing or ambiguous.
    """
    files = members.files
    images = [suffix for suffix in files if f".{suffix}" in SUFFIXES]
    names = ", ".join(name for name, _, _ in files.values())
    if len(images) != 1:
        what = "no image" if not images else f"{len(images)} images"
        raise UserError(f"{shard}: the sample {key!r} has {what}; its members are {names}")
    name, offset, length = files[images[0]]
    if "cls" in files:
        label = members.words.get("cls", b"").decode("utf-8", "replace").strip()
        if not label:
            raise UserError(f"{shard}: {files['cls'][0]} has no class number or name")
    elif "json" in files:
        label = _json_label(f"{shard}: {files['json'][0]}", members.words.get("json", b""))
    elif "txt" in files:
        raise UserError(
            f"{shard}: the sample {key!r} has a caption ({files['txt'][0]}), but captions are not classes. "
            f"Expected {key}.cls, or {key}.json with 'label'; for captions: --data.dataset pairs"
        )
    else:
        raise UserError(
            f"{shard}: the sample {key!r} has no label, its members are {names}. "
            f"Expected {key}.cls, or {key}.json with 'label'"
        )
    return Sample(name, offset, length, label)


def _json_label(where: str, content: bytes) -> str:
    """Return the ``label`` or ``cls`` of a JSON object.

    Raises:
        UserError: No value is a whole number or a name.
    """
    try:
        loaded = parse_json(content)
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    found = (
        next((loaded[name] for name in ("label", "cls") if name in loaded), None) if isinstance(loaded, dict) else None
    )
    if isinstance(found, bool) or not isinstance(found, int | str) or not str(found).strip():
        raise UserError(f"{where} has no class; expected 'label' or 'cls' with a whole number or a name")
    return str(found).strip()


@contextmanager
def opened(location: str) -> Iterator[IO[bytes]]:
    """Open a local file or a URL for sequential reading.

    Raises:
        UserError: The file cannot be opened or read.
    """
    try:
        if is_url(location):
            system, path = remote(location)
            with system.open(path, "rb", block_size=_READ_AHEAD, cache_type="readahead") as stream:
                yield stream
        else:
            with open_plain(location) as stream:
                yield stream
    except UserError:
        raise
    except Exception as error:  # remote file systems raise many types
        raise unreadable(location, error) from error


def remote(url: str) -> tuple[Any, str]:
    """Return (fsspec's file system, path in it) of a URL; called in each process, because connections do not fork.

    Raises:
        UserError: The URL's protocol is not supported.
    """
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error} (s3://: pip install s3fs; gs://: pip install gcsfs)") from error
    return system, path


def state(url: str) -> tuple[int, int, int]:
    """Return the state of a remote file: a hash of the server's version marks (see `marked`), 0, and its size.

    Raises:
        UserError: The file does not exist.
    """
    system, path = remote(url)
    try:
        about = system.info(path)
    except Exception as error:
        raise unreadable(url, error) from error
    marks = {key: str(about[key]) for key in sorted(about) if re.search("etag|modified|mtime|md5|digest", key, re.I)}
    mark = zlib.crc32(json.dumps(marks, sort_keys=True).encode()) if marks else 0
    return mark, 0, int(about.get("size") or 0)


def marked(state: tuple[int, int, int]) -> bool:
    """Return True if the server gave a version mark: without one, a changed file of the same size looks unchanged."""
    return state[0] != 0


def unreadable(location: str, error: BaseException) -> UserError:
    """Return the error for an unreadable file."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec raises it for every failure
        error = error.__cause__
    gone = isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)
    why = "it does not exist" if gone else getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return UserError(f"The shard {location} cannot be read: {why}")


class _Open:
    """Open file that is closed with its last reference: another thread may still be reading."""

    def __init__(self, path: str) -> None:
        self._stream = open_plain(path)
        self.number = self._stream.fileno()


class Parts:
    """Reader of byte ranges; each process opens its own files on demand and keeps some open."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}}

    def read(self, location: str, offset: int, length: int) -> bytes:
        """Read ``length`` bytes of a file from ``offset``.

        Raises:
            UserError: The file cannot be read, or has become shorter.
        """
        content = self._retried(location, offset, length) if is_url(location) else self._local(location, offset, length)
        if len(content) < length:
            raise UserError(f"The shard {location} has changed during use: it ends before byte {offset + length:,}")
        if len(content) > length:
            raise UserError(
                f"The server of {location} does not support range requests. Copy the shards to this machine"
            )
        return content

    def _local(self, location: str, offset: int, length: int) -> bytes:
        try:
            if not hasattr(os, "pread"):  # Windows
                with open_plain(location) as stream:
                    stream.seek(offset)
                    return stream.read(length)
            file = self._open.get(location)
            if file is None:
                for old in list(self._open)[: len(self._open) - KEEP_OPEN + 1]:
                    self._open.pop(old, None)
                file = self._open[location] = _Open(location)
            return os.pread(file.number, length, offset)
        except OSError as error:
            raise unreadable(location, error) from error

    def _retried(self, location: str, offset: int, length: int) -> bytes:
        for again in range(TRIES):
            system, path = remote(location)
            try:
                content: bytes = system.cat_file(path, start=offset, end=offset + length)
                return content
            except Exception as error:  # connections fail in long runs
                if isinstance(error, FileNotFoundError) or again == TRIES - 1:
                    raise unreadable(location, error) from error
                time.sleep(again + 1)
        raise AssertionError
