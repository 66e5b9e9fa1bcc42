"""Parts of the server alone: limits, batches, deadlines."""

import asyncio
import csv
import io
import json
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import HTTPException
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus
from PIL import Image
from uvicorn import Config
from uvicorn.server import ServerState

from randlora_pl.commands.main import main
from randlora_pl.commands.serve import names_of
from randlora_pl.data.sources import known
from randlora_pl.prompts import CoCoOp, CoOp, MaPLe
from randlora_pl.serving import ServerOptions, app, uploads
from randlora_pl.serving.app import PatientLoop
from randlora_pl.serving.uploads import TAKEN, Connection, Deadline, Gate, Limits, Upload, check_header
from randlora_pl.tasks import DePT, PromptTask
from tests.serving import pictures
from tests.support.products import in_one_item
from tests.tasks.small import shake


def test_limits_are_inclusive() -> None:
    image = pictures.encode(pictures.photo(150, 100), "PNG")
    check_header(image, Limits(0, 15_000))
    with pytest.raises(HTTPException, match="15,000") as refused:
        check_header(image, Limits(0, 14_999))
    assert refused.value.status_code == 413
    formats = set(known(TAKEN))
    assert {"JPEG", "PNG", "GIF", "WEBP", "TIFF"} < formats
    assert "AVIF" not in formats, "its header need not say how large the stream is"


def item(name: str, age: float = 0.0, pixels: int = 64) -> tuple[int, str, float, Upload]:
    return 0, name, time.monotonic() - age, Upload(name.encode(), pixels, 5)


def gather(requests: Any, size: int, seconds: float) -> Any:
    api = SimpleNamespace(max_batch_size=size, batch_timeout=seconds, request_timeout=30.0, stream=False)
    return PatientLoop().get_batch_requests(api, requests, None)


def test_batches_are_filled_up_to_their_size() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    for name in "abcde":
        requests.put(item(name))
    batch, late = gather(requests, 3, 5.0)  # full: nothing is waited for
    assert [name for _, name, _ in batch] == ["a", "b", "c"] and late == []
    assert [name for _, name, _ in gather(requests, 3, 0.0)[0]] == ["d", "e"]


HOLDERS = {"held": 0, "held too": 0, "answered": 0, "elsewhere": 1, "in the queue": None}
"""Which worker has a request."""


def test_a_lost_worker_fails_what_it_held_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "CHECK_SECONDS", 0.01)
    waiting = {name: ResponseBufferItem(asyncio.Event(), worker_id=worker) for name, worker in HOLDERS.items()}
    waiting["answered"].event.set()
    states = {"predict_0": WorkerSetupStatus.STARTING, "predict_1": WorkerSetupStatus.READY}
    server: Any = SimpleNamespace(response_buffer=waiting, workers_setup_status=states)

    async def run() -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(app.answer_lost_requests(server), 0.2)

    asyncio.run(run())
    assert [name for name, item in waiting.items() if item.response] == ["held", "held too"]
    error, status = waiting["held"].response
    assert (error.status_code, status, waiting["held"].event.is_set()) == (503, LitAPIStatus.ERROR, True)
    assert int(error.headers["Retry-After"]) > 0 and "lost" in error.detail


def test_a_batch_waits_for_more_but_not_for_ever() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    requests.put(item("a"))
    threading.Timer(0.1, requests.put, (item("b"),)).start()
    assert len(gather(requests, 2, 20.0)[0]) == 2
    requests.put(item("c"))
    assert len(gather(requests, 2, 0.05)[0]) == 1


def test_late_requests_are_told() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    requests.put(item("old", age=31.0))
    requests.put(item("new"))
    batch, late = gather(requests, 2, 0.0)
    assert [name for _, name, _ in batch] == ["new"] and late == [(0, "old")]


def test_large_images_wait_for_small_ones_but_the_oldest_for_none() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    for name in ("large 1", "large 2", "small 1", "large 3", "small 2"):
        requests.put(item(name, pixels=49_000_000 if "large" in name else 64))
    api = SimpleNamespace(max_batch_size=8, batch_timeout=0.1, request_timeout=30.0, stream=False)
    loop = PatientLoop()
    batches = [[name for _, name, _ in loop.get_batch_requests(api, requests, None)[0]] for _ in range(3)]
    assert batches == [["large 1", "small 1", "small 2"], ["large 2"], ["large 3"]]


def test_no_request_costs_no_processor() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    threading.Timer(0.5, requests.put, (item("a"),)).start()
    before = time.thread_time()
    assert len(gather(requests, 2, 0.0)[0]) == 1
    assert time.thread_time() - before < 0.1


def answer_of(app: Callable[..., Awaitable[None]]) -> list[dict[str, Any]]:
    """What a client gets of an application behind a deadline."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(3600)
        return {}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Deadline(app)({"type": "http"}, receive, send))  # type: ignore[arg-type]
    return sent


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "READ_SECONDS", 0.05)

    async def never_read(scope: Any, receive: Any, send: Any) -> None:
        await receive()

    async def never_answered(scope: Any, receive: Any, send: Any) -> None:
        scope["deadline"].reschedule(asyncio.get_running_loop().time() + 0.05)
        await asyncio.sleep(3600)

    async def answered(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    start, body = answer_of(never_read)
    assert start["status"] == 408 and b"did not arrive" in body["body"]
    assert (b"connection", b"close") in start["headers"]
    start, body = answer_of(never_answered)
    assert start["status"] == 504 and b"takes too long" in body["body"]
    assert answer_of(answered) == [{"type": "http.response.start", "status": 200}]


def status(gate: Gate, path: str = "/predict", **headers: str) -> int:
    """The status of a request; 200 where it is passed on."""
    sent: list[Any] = []
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    asyncio.run(gate({"type": "http", "method": "POST", "path": path, "headers": raw}, receive, send))
    return sent[0]["status"] if sent else 200


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that leaves a request alone."""


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        ("Bearer s3cret", "/predict", 200),
        ("bearer s3cret", "/info", 200),
        ("Bearer S3cret", "/predict", 401),
        ("Basic s3cret", "/predict", 401),
        ("Bearer é", "/predict", 401),
        ("", "/info", 401),
        ("", "/", 200),
        ("", "/health", 200),
    ],
)
def test_a_token_is_asked_for(given: str, path: str, expected: int) -> None:
    assert status(Gate(nothing, {"localhost"}, "s3cret", 1), path, host="localhost", authorization=given) == expected


@pytest.mark.parametrize(
    ("listening", "host", "expected"),
    [
        ("127.0.0.1", "localhost:8000", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "192.168.0.7", 421),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "proxy.example", 200),
        ("0.0.0.0", "192.168.0.7:8000", 200),
        ("::", "[fe80::1]:8000", 200),
        ("0.0.0.0", "evil.example", 421),
    ],
)
def test_hosts_are_those_that_it_is_bound_to(listening: str, host: str, expected: int) -> None:
    assert status(Gate(nothing, names_of(listening, ["Proxy.example"]), "", 1), host=host) == expected


def test_requests_at_a_time_are_bounded() -> None:
    assert status(Gate(nothing, {"localhost"}, "", 0), host="localhost") == 503


@pytest.mark.parametrize("sent", [b"", b"POST /predict HTTP/1.1\r\nHost: a\r\n"])
def test_headers_must_come_in_time(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(uploads, "HEADER_SECONDS", 0.1)

    async def run() -> bytes:
        config = Config(nothing)
        config.load()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(config, ServerState(), {}), "127.0.0.1", 0)
        async with server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            writer.write(sent)
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return answer

    assert asyncio.run(run()).startswith(b"HTTP/1.1 408") and not uploads._waiting


NAMES = ["cat", "dog", "tree"]


@in_one_item(
    "options",
    [
        {"prompts": CoOp(length=2, words=None)},
        {"prompts": MaPLe(depth=2), "head": DePT()},
        {"prompts": CoCoOp(length=2, words=None)},
    ],
)
def test_a_server_gives_the_probabilities_of_predict(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = PromptTask("tiny", **options)
    task.set_classes(NAMES, [])
    task.adapt()
    shake(task)
    adapter, folder = task.save(tmp_path / "adapter"), tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    table = tmp_path / "table.csv"
    words = ["--images", str(folder), "--device", "cpu", "--top-k", "3", "--output", str(table)]
    assert main(["predict", "--adapter", str(adapter), *words]) == 0
    _, *rows = csv.reader(io.StringIO(table.read_text()))
    monkeypatch.setattr(app, "trust_the_limit", lambda: None)  # of the worker's process
    server = app.ClassifierAPI(ServerOptions(adapter=adapter, batch_size=4, batch_timeout=0.0, workers=64), 10**6)
    server._build("cpu")
    answers = server.predict([Upload((folder / f"{number}.png").read_bytes(), 32 * 40, 3) for number in range(3)])
    assert torch.get_num_threads() == 1
    for (_, *row), answer in zip(rows, answers, strict=True):
        assert answer.status_code == 200
        found = {each["name"]: each["probability"] for each in json.loads(bytes(answer.body))["classes"]}
        expected = dict(zip(row[::2], map(float, row[1::2]), strict=True))
        assert found.keys() == set(NAMES) and found == pytest.approx(expected, abs=2e-6)
    assert len({tuple(row[1:]) for row in rows}) == 3
    monkeypatch.setattr(PromptTask, "predictions", lambda self, outputs: outputs.sigmoid())
    images = torch.rand(2, 3, 32, 32)
    shares = torch.stack(server._probabilities({Upload(b"", 0, 1): image for image in images.split(1)}))
    with torch.inference_mode():
        torch.testing.assert_close(shares, server.tasks[""].class_logits(images).sigmoid())
