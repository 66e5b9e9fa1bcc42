"""The server over loopback: right answers, refusals, and clients that behave badly."""

import csv
import io
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from randlora_pl.commands.main import main
from tests.serving import pictures
from tests.serving.conftest import NAMES
from tests.serving.server import Running, form
from tests.support.products import in_one_item

GOOD, BAD = pictures.good(), pictures.bad()


@pytest.fixture(scope="module")
def predicted(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """What `predict` says of the same files: probability by class, by file name."""
    folder = tmp_path_factory.mktemp("files")
    for name, content in GOOD.items():
        (folder / name).write_bytes(content)
    table = folder / "predictions.csv"
    words = ["predict", "--adapter", str(adapter), "--images", str(folder), "--device", "cpu", "--top-k", "10"]
    assert main([*words, "--output", str(table)]) == 0
    found = {}
    for row in csv.reader(io.StringIO(table.read_text())):
        if row[0] != "image":
            found[Path(row[0]).name] = {row[i]: float(row[i + 1]) for i in range(1, len(row), 2)}
    return found


@in_one_item("name", GOOD)
def test_probabilities_are_those_of_predict(server: Running, predicted: dict[str, dict[str, float]], name: str) -> None:
    for body, kind in ((GOOD[name], "image/*"), form(GOOD[name]), (GOOD[name], "application/octet-stream")):
        status, answer = server.ask("POST", "/predict?top_k=10", body, kind)
        assert status == 200, answer
        classes = answer["classes"]
        assert {entry["name"]: entry["probability"] for entry in classes} == pytest.approx(predicted[name], abs=2e-6)
        shares = [entry["probability"] for entry in classes]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)


def test_the_images_differ(predicted: dict[str, dict[str, float]]) -> None:
    """Else the comparison above would show nothing."""
    assert len({tuple(shares.values()) for shares in predicted.values()}) >= 10
    assert predicted["turned.jpg"] != predicted["colour.jpg"]


def test_top_k(server: Running, digit: bytes) -> None:
    assert len(server.classify(digit)[1]["classes"]) == 5
    assert len(server.classify(digit, "?top_k=1")[1]["classes"]) == 1
    assert len(server.classify(digit, "?top_k=999999999999999")[1]["classes"]) == 10
    for text in ("0", "-1", "x", "1.5", "", "%C2%B2"):
        assert server.classify(digit, f"?top_k={text}") == (400, {"detail": "top_k must be a positive whole number"})


@in_one_item("name", BAD)
def test_bad_uploads_are_refused_in_one_line(server: Running, digit: bytes, name: str) -> None:
    body, kind, status, part = BAD[name]
    began = time.monotonic()
    found, answer = server.ask("POST", "/predict", body, kind)
    assert time.monotonic() - began < 10
    assert found == status and list(answer) == ["detail"], answer
    line = answer["detail"]
    assert part in line and "\n" not in line and len(line) < 300
    assert not re.search(r"Traceback|0x[0-9a-f]{6}|\.py|/tmp|/home|site-packages|data\.on_error", line), line
    assert server.classify(digit)[0] == 200


def test_a_bad_upload_spoils_no_other(server: Running, digit: bytes) -> None:
    """LitServe gives all requests of a batch the error of one: among these many batches there are mixed ones."""
    expected = server.classify(digit)
    cut = BAD["cut JPEG"][0]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(server.classify, [digit, cut] * 40))
    assert {status for status, _ in answers[1::2]} == {422}
    for status, answer in answers[::2]:
        assert status == 200
        ours, theirs = ({entry["name"]: entry["probability"] for entry in a["classes"]} for a in (answer, expected[1]))
        assert ours == pytest.approx(theirs, abs=2e-6)


HEAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize("kind", ["image/png", form(b"")[1]])
def test_a_declared_size_is_refused_before_the_body(server: Running, kind: str) -> None:
    with server.connect() as client:
        client.sendall(f"{HEAD}Content-Type: {kind}\r\nContent-Length: 5000000000\r\n\r\n".encode())
        answer = client.makefile("rb").read().decode()  # to the end: the server closes the connection
    assert answer.startswith("HTTP/1.1 413") and "2 MB that are allowed" in answer


@pytest.mark.parametrize("kind", ["image/png", form(b"")[1]])
def test_an_endless_body_is_refused_at_the_limit(server: Running, kind: str) -> None:
    """Sent in chunks, without a length; as a form, the file's part does not end."""
    start = form(b"")[0].partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    sent, piece = 0, bytes(65536)
    with server.connect() as client:
        client.sendall(f"{HEAD}Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        client.sendall(b"%x\r\n%s\r\n" % (len(start), start))
        try:
            while sent < 200_000_000:
                client.sendall(b"10000\r\n" + piece + b"\r\n")
                sent += len(piece)
        except OSError:  # it was closed
            pass
        answer = b""
        try:
            while got := client.recv(65536):
                answer += got
        except ConnectionResetError:
            pass
    assert answer.startswith(b"HTTP/1.1 413")
    assert 1_900_000 <= sent < 30_000_000  # the limit, and what the system's buffers take


@pytest.mark.parametrize(("host", "kind", "status"), [("localhost", "text/plain", 415), ("evil", "image/png", 421)])
def test_a_refused_client_that_is_still_sending_gets_the_response(
    server: Running, host: str, kind: str, status: int
) -> None:
    head = f"POST /predict HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: 1000000\r\n\r\n"
    with server.connect() as client:
        client.sendall(head.encode())
        for _ in range(10):
            time.sleep(0.01)
            client.sendall(bytes(100_000))
        assert client.makefile("rb").read().startswith(f"HTTP/1.1 {status}".encode())


def test_slow_clients_block_nobody(server: Running, digit: bytes) -> None:
    start = f"{HEAD}Content-Type: image/png\r\nContent-Length: {len(digit)}\r\n\r\n".encode()
    slow = [server.connect() for _ in range(40)]
    try:
        for client in slow:
            client.sendall(start + digit[:20])
        for _ in range(5):
            assert server.classify(digit)[0] == 200
        for client in slow[:20]:
            client.sendall(digit[20:])
            assert client.recv(12) == b"HTTP/1.1 200"
    finally:
        for client in slow:  # the second half leaves in the midst of it
            client.close()
    assert server.classify(digit)[0] == 200


def test_clients_without_headers_lock_nobody_out(server: Running, digit: bytes) -> None:
    many = [server.connect() for _ in range(130)]
    try:
        for client in many:
            client.sendall(b"POST /pre")
        time.sleep(0.2)
        assert [server.classify(digit)[0] for _ in range(5)] == [200] * 5
        assert many[0].recv(12) == b"HTTP/1.1 408"  # the oldest makes room
    finally:
        for client in many:
            client.close()


def test_too_many_requests_are_turned_away(server: Running, digit: bytes) -> None:
    start = f"{HEAD}Content-Type: image/png\r\nContent-Length: {len(digit)}\r\n\r\n".encode()
    many = [server.connect() for _ in range(128)]
    try:
        for client in many:
            client.sendall(start)
        time.sleep(0.5)
        assert server.classify(digit)[0] == 503
    finally:
        for client in many:
            client.close()
    end = time.monotonic() + 10
    while server.classify(digit)[0] != 200:
        assert time.monotonic() < end


def test_page_and_facts(server: Running) -> None:
    status, page = server.ask("GET", "/")
    assert status == 200 and page.startswith("<!doctype html>")
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|url\(""", page)  # nothing from elsewhere
    status, facts = server.ask("GET", "/health")
    assert status == 200 and facts == {
        "status": "ready",
        "adapter": "RandLoRA",
        "base_model": {"library": "open_clip", "name": "tiny", "pretrained": "emoji-fashion"},
        "task": "VisionLanguageTask",
        "classes": NAMES,
        "device": "cpu",
        "limits": {"upload_bytes": 2_000_000, "pixels": 4_000_000},
        "samples": [f"{name}.png" for name in NAMES],
    }
    assert server.ask("GET", "/info")[1]["model"]["classes"] == NAMES


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "10.0.0.1"])
def test_foreign_hosts_are_refused(server: Running, host: str) -> None:
    with server.connect() as client:
        client.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert client.recv(12) == b"HTTP/1.1 421"


def test_other_requests(server: Running) -> None:
    assert server.ask("GET", "/predict")[0] == 405
    assert server.ask("GET", "/docs")[0] == 404  # its page would load scripts from elsewhere
    assert server.ask("GET", "/../../etc/passwd")[0] == 404
    assert server.ask("POST", "/shutdown")[0] == 404


@pytest.mark.slow
def test_what_is_printed(server: Running) -> None:
    text = server.log.read_text()
    assert "model    open_clip tiny (emoji-fashion) with RandLoRA, 1 worker on cpu" in text
    assert "classes  10: zero, one, two, three, four, ..." in text
    assert f"curl -F image=@photo.jpg 'http://127.0.0.1:{server.port}/predict?top_k=3'" in text
    assert "limits   2 MB and 4,000,000 pixels per image; up to 8 images per batch, collected for 10 ms" in text
    assert f"Ready: http://127.0.0.1:{server.port}/" in text
    assert list(server.log.parent.iterdir()) == [server.log]  # LitServe likes to write a client.py
