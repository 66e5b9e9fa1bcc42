"""Archives, good and hostile."""

import errno
import gzip
import io
import lzma
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from randlora_pl.data.download import unpack
from randlora_pl.utils.errors import UserError
from tests.support.products import in_one_item

NOISE = np.random.default_rng(0).bytes(50_000)
TARS = ("tar", "tar.gz", "tgz", "tar.bz2", "tar.xz")
GOOD = {"set/a.jpg": NOISE, "./set/deep/b.jpg": b"b", "set//c.txt": b"", "set/__MACOSX": b"no junk"}
JUNK = {"__MACOSX/set/._a.jpg": b"x", "set/._a.jpg": b"x", "._set": b"x", "set/.DS_Store": b"x"}

Pack = Callable[..., Path]


def tar(path: Path, files: dict[str, bytes], *members: tarfile.TarInfo) -> Path:
    kind = {"tgz": "gz", "tar": ""}.get(path.name.rpartition(".")[2], path.name.rpartition(".")[2])
    with tarfile.open(path, f"w:{kind}") as packed:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.uid = len(content), 0o4777, 0
            packed.addfile(info, io.BytesIO(content))
        for member in members:
            packed.addfile(member)
    return path


def zipped(path: Path, files: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            info = zipfile.ZipInfo("placeholder")
            info.filename, info.external_attr, info.compress_type = name, mode << 16, zipfile.ZIP_DEFLATED
            packed.writestr(info, content)
    return path


def pack(folder: Path, suffix: str, files: dict[str, bytes]) -> Path:
    path = folder / f"archive.{suffix}"
    return zipped(path, files) if suffix == "zip" else tar(path, files)


def held(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@in_one_item("suffix", [*TARS, "zip"])
def test_what_is_packed_comes_out_without_junk(tmp_path: Path, suffix: str) -> None:
    told: list[tuple[int, int | None]] = []
    path = pack(tmp_path, suffix, GOOD | JUNK | {"set/big.bin": b"not wanted"})
    count = unpack(path, tmp_path / "out", ("set/big*",), lambda done, total: told.append((done, total)))
    assert held(tmp_path / "out") == {
        "set/a.jpg": NOISE,
        "set/deep/b.jpg": b"b",
        "set/c.txt": b"",
        "set/__MACOSX": b"no junk",
    }
    assert count == 4 and told and all(done <= (total or 0) for done, total in told)
    mode = (tmp_path / "out/set/a.jpg").stat().st_mode
    assert not mode & (stat.S_ISUID | stat.S_IXUSR)


def test_a_single_file(tmp_path: Path) -> None:
    (tmp_path / "digits-ubyte.gz").write_bytes(gzip.compress(NOISE))
    assert unpack(tmp_path / "digits-ubyte.gz", tmp_path / "out") == 1
    assert held(tmp_path / "out") == {"digits-ubyte": NOISE}


OUTSIDE = [
    "../evil",
    "set/../../evil",
    "/evil",
    "C:/evil",
    "set/C:evil",
    "..\\evil",
    "set\\..\\..\\evil",
    "\\\\host\\x",
]


@in_one_item("name", OUTSIDE)
@in_one_item("suffix", ["tar", "tar.gz", "zip"])
def test_nothing_lands_outside_the_folder(tmp_path: Path, name: str, suffix: str) -> None:
    path = pack(tmp_path, suffix, {"set/a": b"a", name: b"evil"})
    out = tmp_path / "way/down/out"
    if name.startswith("../") or "/../.." in name:
        with pytest.raises(UserError, match="was not unpacked"):
            unpack(path, out)
    else:
        unpack(path, out)
    assert not [
        found
        for found in (*tmp_path.rglob("*"), Path("/evil"))
        if found.exists() and "evil" in found.name and out not in found.parents
    ]


def test_a_null_byte_hides_nothing(tmp_path: Path) -> None:
    path = zipped(tmp_path / "archive.zip", {"set/a.jpg0../../evil": b"x"})
    path.write_bytes(path.read_bytes().replace(b"a.jpg0", b"a.jpg\0"))
    unpack(path, tmp_path / "out")
    assert held(tmp_path / "out") == {"set/a.jpg": b"x"}


@in_one_item(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a special file"),
        (tarfile.BLKTYPE, "a special file"),
        (tarfile.FIFOTYPE, "a special file"),
        (tarfile.GNUTYPE_SPARSE, "a link, a sparse file"),
    ],
)
def test_links_and_devices_in_tars_are_refused(tmp_path: Path, kind: bytes, word: str) -> None:
    info = tarfile.TarInfo("set/way-out")
    info.type, info.linkname = kind, "/etc"
    path = tar(tmp_path / "archive.tar", {"set/a": b"a"}, info)
    with pytest.raises(UserError, match=f"was not unpacked: 'set/way-out' is {word}"):
        unpack(path, tmp_path / "out")
    assert not (tmp_path / "out/set/way-out").exists()


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644])
def test_links_and_devices_in_zips_are_refused(tmp_path: Path, mode: int) -> None:
    path = zipped(tmp_path / "archive.zip", {"way-out": b"/etc"}, mode)
    with pytest.raises(UserError, match="'way-out' is a link or a device"):
        unpack(path, tmp_path / "out")


BOMB = bytes(40 << 20)


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.xz", "gz"])
def test_bombs_are_refused_while_they_go_off(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"archive.{suffix}"
    if suffix == "gz":
        path.write_bytes(gzip.compress(BOMB))
    else:
        pack(tmp_path, suffix, {"bomb": BOMB})
    with pytest.raises(UserError, match="200"):
        unpack(path, tmp_path / "out")
    assert sum(map(len, held(tmp_path / "out").values())) <= 17 << 20


def test_a_bomb_that_lies_about_its_size(tmp_path: Path) -> None:
    path = pack(tmp_path, "zip", {"bomb": BOMB})
    size = len(BOMB).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(UserError):
        unpack(path, tmp_path / "out")
    assert sum(map(len, held(tmp_path / "out").values())) <= 17 << 20


def test_a_bomb_of_empty_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("randlora_pl.data.download.FLOOR", 1 << 16)
    path = pack(tmp_path, "tar.xz", {f"{number:06d}": b"" for number in range(3_000)})
    with pytest.raises(UserError, match="200"):
        unpack(path, tmp_path / "out")


def header(size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo("x")
    info.size, info.type = max(0, size), kind
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        raw[124:136] = b"\xff" + (size % 2**88).to_bytes(11, "big")
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@in_one_item("size", [-1024, 10 << 20, 2**40, 2**62, 2**70])
@in_one_item("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.REGTYPE])
def test_sizes_in_headers_are_not_believed(
    tmp_path: Path, kind: bytes, size: int, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / ("a.tar" if pack is bytes else "a.tar.gz")
    path.write_bytes(pack(header(0, tarfile.REGTYPE) + header(size, kind) + bytes(40_000)))
    with pytest.raises(UserError, match="was not unpacked"):
        unpack(path, tmp_path / "out")


def test_long_names_are_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what nobody unpacks."""
    monkeypatch.setattr("randlora_pl.data.download.FLOOR", 1 << 16)
    path = tmp_path / "a.tar.gz"
    for content in (header(1 << 20, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 20), bytes(40 << 20)):
        path.write_bytes(gzip.compress(header(0, tarfile.REGTYPE) + content))
        with pytest.raises(UserError, match="200"):
            unpack(path, tmp_path / "out")
    tar(path, {"._" + "x" * 90: bytes(1 << 20), "a": b""})
    with pytest.raises(UserError, match="200"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_tars_that_are_not_whole(tmp_path: Path, suffix: str) -> None:
    plain = tar(tmp_path / "whole.tar", {"a": NOISE, "b": NOISE, "c": b"c"}).read_bytes()
    second = plain.index(b"b\0\0\0")
    path = tmp_path / f"archive.{suffix}"
    pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.xz": lzma.compress}[suffix]
    for damaged, why in (
        (plain[:second], "it has no end mark"),
        (plain[:second] + b"rubbish" + plain[second + 7 :], "it has no end mark"),
        (plain[:second] + bytes(512) + plain[second + 512 :], "it has no end mark"),
        (plain[:second] + bytes(8192) + plain[second + 8192 :], "it has data after its end mark"),
        (plain + plain, "it has data after its end mark"),
    ):
        path.write_bytes(pack(damaged))
        with pytest.raises(UserError, match=f"is damaged and was not unpacked: {why}"):
            unpack(path, tmp_path / "out")
    end = plain.index(b"c\0\0\0") + 1024
    for whole in (plain[: end + 1024], plain[: end + 1024] + b"left on the tape", plain + bytes(1 << 20)):
        path.write_bytes(pack(whole))
        assert unpack(path, tmp_path / "out") == 3


def test_the_checksum_of_gzip_is_compared(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar.gz", {"a": NOISE})
    damaged = bytearray(path.read_bytes())
    damaged[-6] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="CRC"):
        unpack(path, tmp_path / "out")


@in_one_item("suffix", [*TARS, "zip", "gz"])
def test_damaged_archives_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"archive.{suffix}"
    if suffix == "gz":
        path.write_bytes(gzip.compress(NOISE))
    else:
        pack(tmp_path, suffix, {"set/a": NOISE, "set/b": NOISE})
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 3], b"no archive", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"archive\.[a-z0-9.]+"):
            unpack(path, tmp_path / "out")


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    path = tar(tmp_path / "archive.tar", {"set": b"a", "set/a": b"a"})
    with pytest.raises(UserError, match="unpacked"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["tar", "zip"])
def test_a_full_disk(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path, suffix, {"a": NOISE})

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile, "copyfileobj", full)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="cannot be unpacked"):
        unpack(path, tmp_path / "out")
