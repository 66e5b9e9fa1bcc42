"""Access of clients: host name, token and number of requests; limits for connections without a request."""

import asyncio
import hmac
import ipaddress
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEADER_SECONDS = 10.0
"""Maximum time for a client to send the headers of a request."""

WAITING = 128
"""Maximum number of connections without a complete request; a further one closes the oldest."""

DRAIN_SECONDS = 10.0
"""Maximum time to read the rest of a refused body."""

_LATE = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

_waiting: dict["Connection", asyncio.TimerHandle] = {}  # of this process, oldest first


class _Body:
    """Body of a request, of which the rest can be read and discarded.

    Closing a connection with unread bytes resets it, so that a client that is still sending misses the response.
    """

    def __init__(self, scope: Any, receive: Any) -> None:
        self._scope, self._receive, self._more = scope, receive, True

    async def read(self) -> Any:
        """Return the next message."""
        message = await self._receive()
        self._more = message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read the rest, up to twice the limit of an upload; not a body that declares more."""
        left = 2 * self._scope["app"].state.limits.upload_bytes
        declared = dict(self._scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > left:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while self._more and left > 0:
                    left -= len((await self.read()).get("body", b""))


class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # uvicorn chooses the implementation
    """uvicorn's connection with a timeout for request headers, which uvicorn lacks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._answer: Any = self.app  # type: ignore[has-type]
        self._requests = 0
        self.app = self._begun

    def connection_made(self, transport: Any) -> None:
        """Start the timeout; close the oldest waiting connection if too many wait."""
        super().connection_made(transport)
        if len(_waiting) >= WAITING:
            next(iter(_waiting))._close()
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Restart the timeout if data after a response begins a new request."""
        if not self._requests and self not in _waiting:
            self._wait()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeout."""
        self._stop_waiting()
        super().connection_lost(exc)

    async def _begun(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request with complete headers."""
        self._stop_waiting()
        self._requests += 1
        body = _Body(scope, receive)

        async def drained(message: Any) -> None:
            if message["type"] == "http.response.start" and (b"connection", b"close") in message["headers"]:
                await body.drain()
            await send(message)

        try:
            await self._answer(scope, body.read, drained)
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


OPEN = ("/", "/health")
"""Paths without a token: the page, which asks for the token, and the ready state without model facts."""


class Gate:
    """Refuse requests before their bodies are read.

    A web page from another site can make a browser send requests to this machine under its own host name (DNS
    rebinding), but not under the server's names.

    ``hosts`` are in lower case; with ``*`` the server is bound to all addresses, and any IP address is accepted. An
    empty ``token`` disables the check.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], token: str, most: int) -> None:
        self.app, self.hosts, self.token, self.most = app, frozenset(hosts), token.encode(), most
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or respond with 401, 421 or 503."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            await refusal(scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        close = {"Connection": "close"}  # a body may follow
        if not self._is_ours(headers.get("host", "")):
            what = "host name not allowed; add it with serve --allow-host NAME"
            return JSONResponse({"detail": what}, 421, close)
        kind, _, given = headers.get("authorization", "").partition(" ")
        known = kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token)
        scope["trusted"] = known or not self.token
        if not scope["trusted"] and scope["path"] not in OPEN:
            what = "send the server's token: Authorization: Bearer TOKEN"
            return JSONResponse({"detail": what}, 401, close | {"WWW-Authenticate": "Bearer"})
        if self.running >= self.most:
            return JSONResponse({"detail": "too many requests at a time; try again"}, 503, close)
        return None

    def _is_ours(self, host: str) -> bool:
        name = (host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]).lower()
        if name in self.hosts or "*" not in self.hosts:
            return name in self.hosts
        try:
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False
