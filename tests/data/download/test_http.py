"""Downloads from a server on this machine."""

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from randlora_pl.data import download as fetch
from randlora_pl.data.download import download
from randlora_pl.utils.errors import UserError
from randlora_pl.utils.text import byte_size
from tests.data.download.server import Server, md5, serving

CONTENT = np.random.default_rng(0).bytes(1_000_000)
OTHER = np.random.default_rng(1).bytes(900_000)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(fetch, "PAUSE", 0.001)
    with serving() as served:
        served.files["a.bin"] = CONTENT
        yield served


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in" / "a.bin"


def interrupted(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, after: int = 400_000) -> None:
    """A download that was stopped when so much had come."""

    def stop(done: int, total: int | None) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fetch, "_CHUNK", 100_000)
        with pytest.raises(KeyboardInterrupt):
            download([f"{server.url}/a.bin"], target, md5(CONTENT), stop)
    assert not target.exists() and target.with_name("a.bin.part").stat().st_size >= after - 100_000


def comes(server: Server, target: Path, content: bytes = CONTENT) -> None:
    download([f"{server.url}/a.bin"], target, md5(content))
    assert target.read_bytes() == content


def nothing_left(target: Path) -> bool:
    return not list(target.parent.iterdir())


def test_a_file_comes_whole_and_the_progress_is_told(server: Server, target: Path) -> None:
    told: list[tuple[int, int | None]] = []
    source = download([f"{server.url}/a.bin"], target, md5(CONTENT), lambda done, total: told.append((done, total)))
    assert source == f"{server.url}/a.bin" and target.read_bytes() == CONTENT
    assert told[0] == (0, 1_000_000) and told[-1] == (1_000_000, 1_000_000)
    assert fetch.fetched(target) and not target.with_name("a.bin.part").exists()
    fetch.forget(target)
    assert nothing_left(target)


def test_dropped_connections_are_taken_up_again(server: Server, target: Path) -> None:
    server.drops = [300_000, 0, 1, 250_000]
    comes(server, target)
    parts = [f"bytes={done}-" for done in (300_000, 300_000, 300_001, 550_001)]
    assert server.ranges_asked() == ["", *parts]


def test_parts_that_are_shorter_than_asked_are_put_together(server: Server, target: Path) -> None:
    server.drops, server.most = [300_000], 150_000
    comes(server, target)
    assert server.ranges_asked()[:4] == ["", *(f"bytes={done}-" for done in (300_000, 450_000, 600_000))]


def test_an_interrupted_download_goes_on(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(server, target, monkeypatch)
    have = target.with_name("a.bin.part").stat().st_size
    comes(server, target)
    assert server.ranges_asked() == ["", f"bytes={have}-"]


def test_a_changed_file_is_noticed_by_its_checksum(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(server, target, monkeypatch)
    server.files["a.bin"] = OTHER
    comes(server, target, OTHER)
    assert server.ranges_asked()[-1] == ""


def test_a_file_that_changes_while_it_is_fetched_starts_anew(server: Server, target: Path) -> None:
    server.drops = [300_000]
    server.files["a.bin"], server.changes["a.bin"] = OTHER, CONTENT
    comes(server, target)
    assert server.ranges_asked() == ["", "bytes=300000-", ""]


def test_packed_answers(server: Server, target: Path) -> None:
    server.encoding = "x-gzip"  # what Apache says of a .tgz that it sends as it is
    server.files["a.tgz"] = CONTENT
    download([f"{server.url}/a.tgz"], target.with_name("a.tgz"), md5(CONTENT))
    assert target.with_name("a.tgz").read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(server, target, monkeypatch)
    server.ranges = False
    comes(server, target)


def test_a_part_that_is_whole_or_too_long(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (CONTENT, CONTENT + b"more"):
        interrupted(server, target, monkeypatch)
        target.with_name("a.bin.part").write_bytes(content)
        comes(server, target)
        fetch.forget(target)


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_wrong_checksum_is_refused_and_leaves_nothing(server: Server, target: Path, kind: str) -> None:
    with pytest.raises(UserError, match=f"is wrong: its {kind} is .*, expected 00$"):
        download([f"{server.url}/a.bin"], target, f"{kind}:00")
    assert nothing_left(target)


def test_mirrors_are_asked_in_turn(server: Server, target: Path) -> None:
    server.files["old/a.bin"] = OTHER
    urls = ["http://127.0.0.1:1/a.bin", f"{server.url}/gone/a.bin", f"{server.url}/old/a.bin", f"{server.url}/a.bin"]
    assert download(urls, target, md5(CONTENT)) == urls[-1]
    assert target.read_bytes() == CONTENT


def test_another_mirror_sends_the_rest(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(server, target, monkeypatch)
    server.files["first/a.bin"] = CONTENT
    download([f"{server.url}/first/a.bin", f"{server.url}/a.bin"], target, md5(CONTENT))
    assert target.read_bytes() == CONTENT
    assert [path for _, path, _ in server.asked] == ["a.bin", "first/a.bin"] and server.ranges_asked()[-1] != ""


def test_a_busy_server_is_asked_again(server: Server, target: Path) -> None:
    server.statuses = [503, 429, 500]
    comes(server, target)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"files": {}}, r"127\.0\.0\.1:\d+"),
        ({"encoding": "gzip"}, r"127\.0\.0\.1:\d+"),
        ({"statuses": [503] * 20}, "503"),
        ({"kind": "text/html; charset=utf-8"}, "sends"),
        ({"lie": 10, "ranges": False}, "10"),
    ],
)
def test_answers_without_the_file_are_refused(
    server: Server, target: Path, answers: dict[str, Any], message: str
) -> None:
    vars(server).update(answers)
    with pytest.raises(UserError, match=message):
        download([f"{server.url}/a.bin"], target, md5(CONTENT))
    assert not target.exists()


def test_offline_is_told_within_seconds(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_name(*words: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    interrupted(server, target, monkeypatch)  # even where something has come
    monkeypatch.setattr(fetch, "PAUSE", 60.0)
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"data\.example"):
        download(["https://data.example/a.bin"], target, md5(CONTENT))
    assert time.monotonic() - start < 2


def test_a_full_disk_is_told_before_the_download(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5_000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"1\.0"):
        download([f"{server.url}/a.bin"], target, md5(CONTENT))
    assert nothing_left(target)


def test_a_disk_that_fills_up_keeps_what_has_come(target: Path, server: Server) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    target.with_name("a.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="written"):
        download([f"{server.url}/a.bin"], target, md5(CONTENT))


def test_sizes() -> None:
    told = {999: "999 bytes", 1_000: "1.0 kB", 170_498_071: "170.5 MB", 37 * 10**9: "37.0 GB"}
    assert {count: byte_size(count) for count in told} == told
