import asyncio
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from randlora_pl.commands.serve import names_of
from randlora_pl.serving import uploads
from randlora_pl.serving.uploads import Connection, Gate


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
