"""Connections on which no request arrives: ended after some seconds, and the oldest first where there are many."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_SECONDS = 10.0
"""How long a client may take to send the headers of a request."""

WAITING = 128
"""Connections without a complete request at a time; a further one ends the oldest of them."""

_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_waiting: dict["Connection", asyncio.TimerHandle] = {}  # those of this process, the oldest first


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # whichever uvicorn takes
    """uvicorn's connection, with a limit of time until the headers of a request are there; uvicorn has none."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._answer: Any = self.app  # type: ignore[has-type]
        self._requests = 0
        self.app = self._begun

    def connection_made(self, transport: Any) -> None:
        """Begins to wait, in the place of the oldest where too many wait."""
        super().connection_made(transport)
        if len(_waiting) >= WAITING:
            next(iter(_waiting))._close()
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Takes what the client sends; after an answer the next request begins with it."""
        if not self._requests and self not in _waiting:
            self._wait()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Waits no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    async def _begun(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, whose headers are there."""
        self._stop_waiting()
        self._requests += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._requests -= 1

    def _wait(self) -> None:
        _waiting[self] = self.loop.call_later(HEADER_SECONDS, self._close)

    def _stop_waiting(self) -> None:
        if timer := _waiting.pop(self, None):
            timer.cancel()

    def _close(self) -> None:
        self._stop_waiting()
        if not self.transport.is_closing():
            self.transport.write(_LATE)
            self.transport.close()
