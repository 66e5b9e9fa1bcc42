"""The server over loopback: right answers, refusals, and clients that behave badly."""

import csv
import io
import json
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from randlora_pl import serving
from randlora_pl.commands.main import main
from randlora_pl.data.catalog import CATALOG
from randlora_pl.serving import ServerOptions, app, uploads
from randlora_pl.serving.uploads import COUNT, Limits, read_samples
from randlora_pl.utils.errors import UserError
from tests.docs.pages import PAGES
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
    assert len({tuple(shares.values()) for shares in found.values()}) >= 10  # else equal answers would show nothing
    assert found["turned.jpg"] != found["colour.jpg"]
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


def test_other_requests(server: Running) -> None:
    assert server.ask("GET", "/predict")[0] == 405
    assert server.ask("GET", "/docs")[0] == 404  # its page would load scripts from elsewhere
    assert server.ask("GET", "/../../etc/passwd")[0] == 404
    assert server.ask("POST", "/shutdown")[0] == 404


LIMITS = Limits(2_000_000, 4_000_000)


def trained_on(dataset: str) -> dict[str, dict[str, str]]:
    return {"training": {"dataset": dataset}}


def test_one_test_image_of_each_class_of_embedded_data() -> None:
    found = read_samples(None, trained_on("digits"), LIMITS)
    assert list(found) == [f"{name}.png" for name in CATALOG["digits"].classnames]
    assert len(set(found.values())) == 10
    assert {Image.open(io.BytesIO(content)).size for content in found.values()} == {(8, 8)}


@in_one_item("dataset", [name for name in CATALOG if name not in ("digits", "mnist_5k")] + ["", "gone"])
def test_no_other_data_are_shown_unasked(dataset: str) -> None:
    assert read_samples(None, trained_on(dataset), LIMITS) == {}
    assert read_samples(None, {}, LIMITS) == {}


def test_a_folder_is_shown_in_even_steps(tmp_path: Path) -> None:
    for number in range(25):
        file = tmp_path / ("cats" if number < 12 else "dogs & more") / f"{number:02d} é.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(pictures.encode(pictures.photo(9 + number, 9), "PNG"))
    found = read_samples(tmp_path, trained_on("digits"), LIMITS)
    widths = [Image.open(io.BytesIO(content)).width - 9 for content in found.values()]
    assert len(found) == COUNT and widths == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert list(found)[:2] == ["1-00-.png", "2-02-.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no image", "not an image"),
        (pictures.encode(pictures.photo(3000, 2000), "JPEG"), "6,000,000 pixels"),
        (pictures.encode(pictures.photo(9, 9), "PNG") + bytes(2_000_000), "2,000,000"),
    ],
)
def test_samples_keep_to_the_limits(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_samples(tmp_path, {}, LIMITS)


def test_samples_are_fetched_by_their_names_alone(server: Running) -> None:
    status, facts = server.ask("GET", "/health")
    assert status == 200 and facts["samples"][:2] == ["zero.png", "one.png"]
    assert Image.open(io.BytesIO(server.fetch("/samples/three.png"))).size == (8, 8)
    for path in ("/samples/none.png", "/samples/..%2Fpage.html", "/samples/", "/samples/../page.html"):
        assert server.ask("GET", path)[0] == 404, path


PAGE = PAGES["docs/serve.md"]
REASONS = dict(re.findall(r"^\| (\d{3}) \| (.+) \|$", PAGE, flags=re.M))


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, flags=re.S)


@pytest.fixture(scope="module")
def answers(server: Running, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example prints; the port alone is another one."""
    if not shutil.which("curl"):
        pytest.skip("needs curl, which the examples call")
    folder, found = tmp_path_factory.mktemp("pasted"), {}
    for block in re.findall(r"```(?:sh|python)\n(.*?)```", PAGE, flags=re.S):
        if "randlora-pl" in block:
            continue
        program = ["python", "-c"] if block.startswith("import") else ["bash", "-c"]
        text = block.replace(":8000", f":{server.port}")
        done = subprocess.run([*program, text], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
        found[block] = done.stdout
    assert (folder / "three.png").stat().st_size > 50
    return found


def test_examples_classify_the_sample(answers: dict[str, str]) -> None:
    sent = {block: json.loads(answer) for block, answer in answers.items() if block.startswith("curl -") and answer}
    counts = sorted(
        len(answer["classes"]) for answer in sent.values() if "classes" in answer and "status" not in answer
    )
    assert counts == [3, 5, 5]  # top_k, and its default
    ((python, printed),) = ((block, answer) for block, answer in answers.items() if block.startswith("import"))
    first = next(answer for block, answer in sent.items() if "top_k=3" in block)["classes"]
    assert [line.split()[0] for line in printed.splitlines()] == [entry["name"] for entry in first], python


def test_shown_answers_have_the_fields_and_the_words_of_real_ones(answers: dict[str, str]) -> None:
    response, error = map(json.loads, blocks("json"))
    real = {block: json.loads(answer) for block, answer in answers.items() if answer.startswith("{")}
    assert error in real.values()
    (classified,) = (answer for block, answer in real.items() if "top_k=3" in block)
    assert list(response) == list(classified) and list(response["classes"][0]) == list(classified["classes"][0])


def test_every_fact_and_every_status_is_explained(server: Running) -> None:
    facts = server.ask("GET", "/health")[1]
    table = PAGE.partition("| field of `/health` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == list(facts)
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(serving.__path__[0]).glob("*.py"))
    assert set(REASONS) == set(re.findall(r"(?<![\w.,])[45]\d\d(?![\w.,]\d|\d)", sources))


def test_limits_are_those_of_the_program() -> None:
    options = ServerOptions(adapter=Path("a"))
    for words in (
        f"{options.max_upload_mb:g} MB | `--max-upload-mb`",
        f"{options.max_pixels:,} pixels | `--max-pixels`",
        f"at a time | {app.REQUESTS} |",
        f"headers | {uploads.HEADER_SECONDS:g} s",
        f"send the image | {uploads.READ_SECONDS:g} s",
        f"the response | {uploads.ANSWER_SECONDS:g} s",
        f"`--batch-size` ({options.batch_size}), gathered for `--batch-timeout` ({options.batch_timeout:g} s)",
    ):
        assert words in PAGE, words
