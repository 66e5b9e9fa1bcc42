"""Uncompressed tar files of images: what is in them, and parts of them, here or behind a URL."""

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
"""Files of this machine that a process keeps open."""

TRIES = 3
"""Times that a remote file is asked for before a run ends."""

LABEL_BYTES = 2**20
"""Most bytes of a file that says a label."""

PADDING = 2**20
"""Most zeros at the end of a file that need no remark; tar pads to 10,240 bytes, or as its option -b says."""

_READ_AHEAD = 2**22
_CHUNK = 2**18
_LABELS = ("cls", "json")
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True)
class Sample:
    """An image in a tar file.

    Attributes:
        member: Its name in the file.
        offset: Where its bytes begin.
        length: How many they are.
        label: What the file says of its class: a number or a name.
    """

    member: str
    offset: int
    length: int
    label: str


@dataclass
class _Members:
    """Files of one sample: (name, offset, length) by suffix, and the bytes of those that may say the label."""

    files: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    words: dict[str, bytes] = field(default_factory=dict)


def scan(shard: str) -> tuple[list[Sample], str]:
    """The samples of a tar file in the order of their images, and a remark or an empty string.

    Files whose names agree up to the first dot of the last part are a sample, as in WebDataset.

    Raises:
        UserError: The file is missing, compressed or damaged, or a sample is incomplete or there twice.
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
                raise UserError(f"{shard}: the member {name!r} is there twice, the second at byte {offset:,}")
            sample.files[suffix] = (name, offset, length)
            if suffix in _LABELS and length <= LABEL_BYTES:
                stream.seek(offset)
                sample.words[suffix] = stream.read(length)
        remark = _ending(shard, stream)
    samples = [_sample(shard, key, members) for key, members in groups.items()]
    return sorted(samples, key=lambda sample: sample.offset), remark


def _files(shard: str, stream: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of the regular files in a tar file; afterwards the stream stands at its end mark.

    Raises:
        UserError: It is compressed, no tar file, or cut off, or a member is sparse.
    """
    head = stream.read(6)
    for sign, remedy in _COMPRESSED.items():
        if head.startswith(sign):
            raise UserError(f"{shard} is compressed, so that nothing in it can be read by itself: {remedy} it first")
    stream.seek(0)
    last = ""
    begin = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                last, begin = info.name, info.offset
                if info.issparse():
                    raise UserError(
                        f"{shard}: the member {last!r} is sparse, so that it is not in one piece: make the shard "
                        "without tar's option --sparse"
                    )
                if info.isreg():
                    yield info.name.removeprefix("./"), info.offset_data, info.size
            end = tar.offset
    except tarfile.ReadError as error:
        if last:
            where = f"within the member {last!r} that begins at byte {begin:,}"
            raise UserError(f"The shard {shard} is cut off {where} ({error}): copy or make it again") from error
        raise UserError(f"{shard} is no tar file ({error})") from error
    stream.seek(end)


def _ending(shard: str, stream: IO[bytes]) -> str:
    """A remark on how the file ends.

    The rest of it must be zeros: tarfile takes the first block of zeros for the end, though it may be a hole in a
    file that has not been copied whole, or the end of the first of several files.

    Raises:
        UserError: There is something that is no member.
    """
    where = stream.tell()
    mark = stream.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise UserError(f"The shard {shard} is damaged at byte {where:,}: copy or make it again")
    zeros = len(mark)
    while rest := stream.read(_CHUNK):
        something = rest.lstrip(b"\0")
        zeros += len(rest) - len(something)
        if something:
            raise UserError(
                f"The shard {shard} has an end mark at byte {where:,}, but goes on at byte {where + zeros:,}: it is "
                "damaged, or was joined from several (tar -A does that right)"
            )
    if zeros > PADDING:
        return f"{shard} holds nothing but zeros from byte {where:,} on, {zeros:,} of them: is the copy complete?"
    return "" if mark else f"{shard} has no end mark: it may have been cut off at byte {where:,}"


def _sample(shard: str, key: str, members: _Members) -> Sample:
    """The image and the label among the files of a sample.

    Raises:
        UserError: One of them is missing or not to be told.
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
            raise UserError(f"{shard}: {files['cls'][0]} holds no class number or name")
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
    """The ``label`` or ``cls`` of a JSON object.

    Raises:
        UserError: There is none that is a whole number or a name.
    """
    try:
        loaded = parse_json(content)
    except ValueError as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    found = (
        next((loaded[name] for name in ("label", "cls") if name in loaded), None) if isinstance(loaded, dict) else None
    )
    if isinstance(found, bool) or not isinstance(found, int | str) or not str(found).strip():
        raise UserError(f"{where} says no class: expected 'label' or 'cls' with a whole number or a name")
    return str(found).strip()


@contextmanager
def opened(place: str) -> Iterator[IO[bytes]]:
    """A file of this machine or behind a URL, for reading from front to back.

    Raises:
        UserError: It cannot be opened or read.
    """
    try:
        if is_url(place):
            system, path = remote(place)
            with system.open(path, "rb", block_size=_READ_AHEAD, cache_type="readahead") as stream:
                yield stream
        else:
            with open_plain(place) as stream:
                yield stream
    except UserError:
        raise
    except Exception as error:  # file systems behind URLs raise what they like
        raise unreadable(place, error) from error


def remote(url: str) -> tuple[Any, str]:
    """(fsspec's file system, path in it) of a URL; asked for anew in each process, because connections do not fork.

    Raises:
        UserError: There is nothing that reads such URLs.
    """
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error} (s3://: pip install s3fs; gs://: pip install gcsfs)") from error
    return system, path


def state(url: str) -> tuple[int, int, int]:
    """What tells whether a remote file has changed: a hash of the marks that its server gives (see `marked`), its size.

    Raises:
        UserError: It is not there.
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
    """Whether the server of a file gave a mark: without one, another file of its size looks the same."""
    return state[0] != 0


def unreadable(place: str, error: BaseException) -> UserError:
    """The error for a file that cannot be read."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec says it of every failure
        error = error.__cause__
    gone = isinstance(error, FileNotFoundError) or getattr(error, "status", None) in (404, 410)
    why = "there is no such file" if gone else getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return UserError(f"The shard {place} cannot be read: {why}")


class _Open:
    """An open file that is closed when nobody uses it any more: another thread may still be reading."""

    def __init__(self, path: str) -> None:
        self._stream = open_plain(path)
        self.number = self._stream.fileno()


class Parts:
    """Reads parts of files; each process opens its own, when it needs them, and keeps some."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}}

    def read(self, place: str, offset: int, length: int) -> bytes:
        """``length`` bytes of a file from ``offset`` on.

        Raises:
            UserError: It cannot be read, or has become shorter.
        """
        content = self._retried(place, offset, length) if is_url(place) else self._local(place, offset, length)
        if len(content) < length:
            raise UserError(f"The shard {place} has changed while it was used: it ends within byte {offset + length:,}")
        if len(content) > length:
            raise UserError(
                f"The server of {place} sends whole files only, but images are read by range: copy the shards here"
            )
        return content

    def _local(self, place: str, offset: int, length: int) -> bytes:
        try:
            if not hasattr(os, "pread"):  # Windows
                with open_plain(place) as stream:
                    stream.seek(offset)
                    return stream.read(length)
            file = self._open.get(place)
            if file is None:
                for old in list(self._open)[: len(self._open) - KEEP_OPEN + 1]:
                    self._open.pop(old, None)
                file = self._open[place] = _Open(place)
            return os.pread(file.number, length, offset)
        except OSError as error:
            raise unreadable(place, error) from error

    def _retried(self, place: str, offset: int, length: int) -> bytes:
        for again in range(TRIES):
            system, path = remote(place)
            try:
                content: bytes = system.cat_file(path, start=offset, end=offset + length)
                return content
            except Exception as error:  # a run of days outlives a connection
                if isinstance(error, FileNotFoundError) or again == TRIES - 1:
                    raise unreadable(place, error) from error
                time.sleep(again + 1)
        raise AssertionError
