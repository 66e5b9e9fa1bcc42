"""Parts of the server alone: limits, batches, deadlines."""

import asyncio
import queue
import threading
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from litserve.utils import LitAPIStatus, ResponseBufferItem

from randlora_pl.data.images.decode import known
from randlora_pl.serving import uploads
from randlora_pl.serving.api import PatientLoop
from randlora_pl.serving.images import TAKEN, Limits, RefusedError, check_header
from randlora_pl.serving.losses import LossAwareTransport
from randlora_pl.serving.uploads import Deadline, Upload
from tests.serving import pictures


def test_limits_are_inclusive() -> None:
    image = pictures.encode(pictures.photo(150, 100), "PNG")
    check_header(image, Limits(0, 15_000))
    with pytest.raises(RefusedError, match="15,000") as refused:
        check_header(image, Limits(0, 14_999))
    assert refused.value.status == 413


def test_formats() -> None:
    """AVIF is left out: its header need not say how large the stream is."""
    assert {"JPEG", "PNG", "GIF", "WEBP", "TIFF"} < set(known(TAKEN)) and "AVIF" not in known(TAKEN)


class Messages:
    """LitServe's transport: from here on the messages are in a list."""

    def __init__(self, *messages: Any) -> None:
        self.messages = list(messages)

    def send(self, message: Any, consumer_id: int) -> None:
        self.messages.append(message)

    async def areceive(self, consumer_id: int) -> Any:
        return self.messages.pop(0)


def upload(name: str, pixels: int = 64) -> Upload:
    return Upload(name.encode(), 5, pixels)


def item(name: str, age: float = 0.0, pixels: int = 64) -> tuple[int, str, float, Upload]:
    return 0, name, time.monotonic() - age, upload(name, pixels)


def gather(requests: Any, size: int, seconds: float) -> tuple[list[Any], list[Any]]:
    api = SimpleNamespace(max_batch_size=size, batch_timeout=seconds, request_timeout=30.0)
    return PatientLoop().get_batch_requests(api, requests, Messages())


def test_batches_are_filled_up_to_their_size() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    for name in "abcde":
        requests.put(item(name))
    batch, late = gather(requests, 3, 5.0)  # full: nothing is waited for
    assert batch == [(0, name, upload(name)) for name in "abc"] and late == []
    assert [name for _, name, _ in gather(requests, 3, 0.0)[0]] == ["d", "e"]


def test_what_a_worker_takes_is_known() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    loop, sent = PatientLoop(), Messages()
    loop._restart_workers, loop._worker_id = True, 3
    requests.put(item("a"))
    requests.put(item("b"))
    api = SimpleNamespace(max_batch_size=1, batch_timeout=0.0, request_timeout=30.0)
    loop.get_batch_requests(api, requests, sent)
    assert [(name, status, worker) for name, (_, status, _, worker) in sent.messages] == [("a", LitAPIStatus.START, 3)]


HOLDERS = {"held": 0, "held too": 0, "answered": 0, "elsewhere": 1, "in the queue": None}
"""Which worker has a request."""


def test_a_lost_worker_fails_what_it_held_alone() -> None:
    waiting = {name: ResponseBufferItem(asyncio.Event(), worker_id=worker) for name, worker in HOLDERS.items()}
    waiting["answered"].event.set()
    transport = LossAwareTransport(Messages(0, ("id", "an answer")), waiting)
    assert asyncio.run(transport.areceive(0)) is None
    assert [name for name, item in waiting.items() if item.response] == ["held", "held too"]
    error, status = waiting["held"].response
    assert (error.status_code, status, waiting["held"].event.is_set()) == (503, LitAPIStatus.ERROR, True)
    assert int(error.headers["Retry-After"]) > 0 and "lost" in error.detail
    assert asyncio.run(transport.areceive(0)) == ("id", "an answer")


def test_a_batch_waits_for_more_but_not_for_ever() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    requests.put(item("a"))
    threading.Timer(0.1, requests.put, (item("b"),)).start()
    assert len(gather(requests, 2, 20.0)[0]) == 2
    requests.put(item("c"))
    assert len(gather(requests, 2, 0.05)[0]) == 1


def test_no_request_is_no_batch_and_late_ones_are_told() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    assert gather(requests, 2, 0.0) == ([], [])
    requests.put(item("old", age=31.0))
    requests.put(item("new"))
    assert gather(requests, 2, 0.0) == ([(0, "new", upload("new"))], [(0, "old")])


def test_large_images_wait_for_small_ones_but_the_oldest_for_none() -> None:
    requests: queue.Queue[Any] = queue.Queue()
    for name in ("large 1", "large 2", "small 1", "large 3", "small 2"):
        requests.put(item(name, pixels=49_000_000 if "large" in name else 64))
    api, loop = SimpleNamespace(max_batch_size=8, batch_timeout=0.1, request_timeout=30.0), PatientLoop()
    batches = [[name for _, name, _ in loop.get_batch_requests(api, requests, Messages())[0]] for _ in range(3)]
    assert batches == [["large 1", "small 1", "small 2"], ["large 2"], ["large 3"]]


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
