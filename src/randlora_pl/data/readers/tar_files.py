"""Uncompressed tar files of images, local or at a URL: their contents, and reads of byte ranges.

`datasets` and `wids` cannot replace this file: both first copy every shard to the local disk, and read damaged shards
without an error (holes end them silently); `wids` also needs the sizes beforehand, and runs URLs in a shell.
"""

import json
import posixpath
import re
import tarfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from randlora_pl.data.locations import is_url
from randlora_pl.data.sources import SUFFIXES
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.files import open_plain, parse_json

TRIES = 3
"""Attempts to read a remote file before a run fails."""


class Sample(NamedTuple):
    """Image in a tar file: its member name, first byte and number of bytes, and its class number or name."""

    member: str
    offset: int
    length: int
    label: str


class _Member(NamedTuple):
    name: str
    offset: int
    length: int
    content: bytes = b""


def scan(shard: str) -> tuple[list[Sample], str]:
    """Return the samples of a tar file in file order, and a warning or "".

    Files with the same name up to the first dot of the last part are one sample, as in WebDataset.

    Raises:
        UserError: The file is missing, compressed or damaged, or a sample is incomplete or repeated.
    """
    groups: dict[str, dict[str, _Member]] = defaultdict(dict)
    try:
        if is_url(shard):
            system, path = remote(shard)
            stream = system.open(path, "rb", block_size=2**22, cache_type="readahead")
        else:
            stream = open_plain(shard)
        with stream:
            for member in _members(shard, stream):
                folder, base = posixpath.split(member.name)
                stem, _, suffix = base.partition(".")
                if not stem or folder.startswith("__"):  # hidden files; __MACOSX
                    continue
                group, suffix = groups[posixpath.join(folder, stem)], suffix.lower()
                if suffix in group:
                    where = f"the second is at byte {member.offset:,}"
                    raise UserError(f"{shard}: the member {member.name!r} is repeated, {where}")
                if suffix in ("cls", "json") and member.length <= 2**20:
                    stream.seek(member.offset)
                    member = member._replace(content=stream.read(member.length))
                group[suffix] = member
            remark = _ending(shard, stream)
    except UserError:
        raise
    except Exception as error:  # remote file systems raise many types
        raise unreadable(shard, error) from error
    samples = [_sample(shard, key, members) for key, members in groups.items()]
    return sorted(samples, key=lambda sample: sample.offset), remark


def compressed(shard: str) -> UserError:
    """Return the error for a compressed tar file."""
    return UserError(f"{shard} is compressed, so its members cannot be read individually. Uncompress it first")


def _members(shard: str, stream: IO[bytes]) -> Iterator[_Member]:
    """Yield the regular files in a tar file; the stream then is at the end mark."""
    if stream.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise compressed(shard)
    stream.seek(0)
    last = ""
    begin = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise all are kept in memory
                last, begin = info.name, info.offset
                if info.size < 0:  # Python before 3.11.14 would read the same members forever
                    raise UserError(f"The shard {shard} is damaged at byte {begin:,}. Copy or write it again")
                if info.issparse():
                    raise UserError(
                        f"{shard}: the member {last!r} is sparse, so it is not contiguous. Write the shard "
                        "without tar's option --sparse"
                    )
                if info.isreg():
                    yield _Member(info.name.removeprefix("./"), info.offset_data, info.size)
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
    """
    where = stream.tell()
    mark = stream.read(tarfile.BLOCKSIZE)
    if mark.strip(b"\0"):
        raise UserError(f"The shard {shard} is damaged at byte {where:,}. Copy or write it again")
    zeros = len(mark)
    while rest := stream.read(2**18):
        something = rest.lstrip(b"\0")
        zeros += len(rest) - len(something)
        if something:
            raise UserError(
                f"The shard {shard} has an end mark at byte {where:,}, but more data at byte {where + zeros:,}: it is "
                "damaged, or several files were concatenated (use tar -A)"
            )
    if zeros > 2**20:  # tar pads to 10,240 bytes, or as set by -b
        return f"{shard} has only zeros after byte {where:,}, {zeros:,} of them. Check that the copy is complete"
    return "" if mark else f"{shard} has no end mark: it may have been cut off at byte {where:,}"


def _sample(shard: str, key: str, members: dict[str, _Member]) -> Sample:
    images = [member for suffix, member in members.items() if f".{suffix}" in SUFFIXES]
    names = ", ".join(member.name for member in members.values())
    if len(images) != 1:
        what = "no image" if not images else f"{len(images)} images"
        raise UserError(f"{shard}: the sample {key!r} has {what}; its members are {names}")
    if "cls" in members:
        label = members["cls"].content.decode("utf-8-sig", "replace").strip()
        if not label:
            raise UserError(f"{shard}: {members['cls'].name} has no class number or name")
    elif "json" in members:
        where = f"{shard}: {members['json'].name}"
        try:
            loaded = parse_json(members["json"].content)
        except ValueError as error:
            raise UserError(f"{where} cannot be read: {error}") from error
        value = loaded.get("label", loaded.get("cls")) if isinstance(loaded, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
            raise UserError(f"{where} has no class; expected 'label' or 'cls' with a whole number or a name")
        label = str(value).strip()
    else:
        what, more = f"no label, its members are {names}", ""
        if "txt" in members:
            what = f"a caption ({members['txt'].name}), but captions are not classes"
            more = "; for captions: --data.dataset pairs"
        expected = f"Expected {key}.cls, or {key}.json with 'label'{more}"
        raise UserError(f"{shard}: the sample {key!r} has {what}. {expected}")
    return Sample(*images[0][:3], label)


def remote(url: str) -> tuple[Any, str]:
    """Return (fsspec's file system, path in it) of a URL; called in each process, because connections do not fork."""
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error} (s3://: pip install s3fs; gs://: pip install gcsfs)") from error
    return system, path


def state(url: str) -> tuple[int, int, int]:
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
