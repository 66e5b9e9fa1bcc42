"""Access control: check the host name, the token and the number of requests.

A web page from another site can make a browser send requests to this machine under its own host name (DNS rebinding),
but not under the server's names.
"""

import hmac
import ipaddress
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN = ("/", "/health")
"""Paths without a token: the page, which asks for the token, and the ready state without model facts."""


class Gate:
    """Refuse requests before their bodies are read.

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
