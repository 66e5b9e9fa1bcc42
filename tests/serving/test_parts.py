"""Parts of the server alone: limits, batches, deadlines."""

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus

from randlora_pl.data.sources import known
from randlora_pl.serving import app, uploads
from randlora_pl.serving.app import PatientLoop
from randlora_pl.serving.uploads import TAKEN, Deadline, Limits, Upload, check_header
from tests.serving import pictures


def test_limits_are_inclusive() -> None:
    image = pictures.encode(pictures.photo(150, 100), "PNG")
    check_header(image, Limits(0, 15_000))
    with pytest.raises(HTTPException, match="15,000") as refused:
        check_header(image, Limits(0, 14_999))
    assert refused.value.status_code == 413


def test_formats() -> None:
    """AVIF is left out: its header need not say how large the stream is."""
    assert {"JPEG", "PNG", "GIF", "WEBP", "TIFF"} < set(known(TAKEN)) and "AVIF" not in known(TAKEN)


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
