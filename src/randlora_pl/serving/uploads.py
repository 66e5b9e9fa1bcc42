"""The HTTP process: access of clients, uploads, read with limits on size and time, and samples that the page offers.

Samples are public to everyone who reaches the server. So they come from a folder that the operator chooses, or from a
dataset of an installed package; images of any other dataset are never shown.
"""

import asyncio
import hmac
import io
import ipaddress
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from randlora_pl.data.catalog import CATALOG, dataset_path, present
from randlora_pl.data.sources import FORMATS, known
from randlora_pl.serving.on_demand import is_name, list_names
from randlora_pl.utils.errors import UserError, first_line

FIELD = "image"
"""Form field with the image."""

READ_SECONDS = 60.0
"""Maximum time for a client to send an upload."""

ANSWER_SECONDS = 45.0
"""Maximum time from the complete upload to the response."""

TAKEN = tuple(name for name in FORMATS if name != "AVIF")
"""Accepted formats, without AVIF: a 1.5 kB file declared as 64 x 64 pixels was decoded to 9000 x 9000."""


@dataclass(frozen=True)
class Limits:
    """Limits of an upload: bytes of a request body, and pixels (width x height) of an image."""

    upload_bytes: int
    pixels: int


@dataclass(frozen=True, eq=False)
class Upload:
    """Bytes of an image file, its pixels (width x height), classes in the response, and the adapter's name."""

    content: bytes
    pixels: int
    top_k: int
    adapter: str = ""


def adapter_name(folder: Path | None, given: Collection[object]) -> str:
    """Return the adapter that a request names, maybe more than once, "" if the server has no folder of adapters.

    Raises:
        HTTPException: The name is missing, or is not a name, or there are two.
    """
    names = {*given} - {""}
    if folder is None:
        if names:
            raise _refusal(400, "this server has one adapter: leave adapter out")
        return ""
    if len(names) != 1 or not isinstance(name := names.pop(), str):
        here = list_names(folder, 21)
        listed = ", ".join(here[:20]) + (", ..." if len(here) > 20 else "")
        raise _refusal(400, f"choose one of the adapters, adapter=NAME: {listed}")
    if not is_name(name):
        raise _refusal(404, "adapter is not a name that an adapter of this server can have")
    return name


async def read_upload(request: Request) -> Upload:
    """Read the image of a request, from a form field or the body.

    Raises:
        HTTPException: 4xx with a one-line reason.
    """
    limits: Limits = request.app.state.limits
    given = request.query_params.get("top_k", "5")
    if not (given.isascii() and given.isdecimal() and int(given[:9]) > 0):
        raise HTTPException(400, "top_k must be a positive whole number")
    too_large = _refusal(413, f"the upload is larger than the {limits.upload_bytes / 1e6:g} MB that are allowed")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and not kind.startswith("image/") and kind != "application/octet-stream":
        ways = f"a form (multipart/form-data) with the field {FIELD!r}, or as the body with Content-Type: image/..."
        raise _refusal(415, f"send the image as {ways}")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.upload_bytes:
        raise too_large
    total = 0

    async def read() -> Message:  # a body sent in chunks declares no length
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > limits.upload_bytes:
            raise too_large
        return message

    folder, named = request.app.state.folder, request.query_params.getlist("adapter")
    if not form or named:
        name = await run_in_threadpool(adapter_name, folder, named)  # before the body
    bounded = Request(request.scope, read)
    try:
        if form:
            async with bounded.form(max_files=1, max_fields=10) as fields:
                value = fields.get(FIELD)
                if not isinstance(value, UploadFile):
                    what = "holds text, not a file" if FIELD in fields else "is missing"
                    how = f"for example: curl -F {FIELD}=@photo.jpg"
                    raise HTTPException(400, f"the form's field {FIELD!r} {what}; {how}")
                content = await value.read()
                name = await run_in_threadpool(adapter_name, folder, [*named, *fields.getlist("adapter")])
        else:
            content = await bounded.body()
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed") from None  # the client is gone
    deadline: asyncio.Timeout = request.scope["deadline"]
    deadline.reschedule(asyncio.get_running_loop().time() + ANSWER_SECONDS)
    pixels = await run_in_threadpool(check_header, content, limits)  # other requests are read meanwhile
    return Upload(content, pixels, int(given[:9]), name)


def check_header(content: bytes, limits: Limits) -> int:
    """Check the image format and the declared size, and return width x height; Pillow decodes nothing.

    Raises:
        HTTPException: The upload is rejected, with status 400, 413, 415 or 422.
    """
    if not content:
        raise HTTPException(400, "the image is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(content), formats=known(TAKEN)) as opened:
            width, height = opened.size
    except UnidentifiedImageError:
        raise HTTPException(415, f"not an image in one of the formats {', '.join(known(TAKEN))}") from None
    except Exception as error:  # ValueError for a text chunk that unpacks to megabytes, struct.error and more
        raise HTTPException(422, f"the image's header is damaged: {first_line(error)}") from None
    if width * height > limits.pixels:
        size = f"{width} x {height} = {width * height:,} pixels"
        raise HTTPException(413, f"the image has {size}; the limit is {limits.pixels:,}. Resize it")
    return int(width * height)


def _refusal(status: int, reason: str) -> HTTPException:
    """Return an error response that closes the connection, because the body was not read completely."""
    return HTTPException(status, reason, {"Connection": "close"})


class Deadline:
    """Time limit of requests: for slow clients and lost workers.

    LitServe itself would wait forever. `read_upload` moves the deadline when it has the image.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and respond with 408 or 504 after the deadline."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            await send(message)  # reads the rest of a rejected body first, see `Connection`
            begun = True

        end = asyncio.get_running_loop().time() + READ_SECONDS
        try:
            async with asyncio.timeout_at(end) as scope["deadline"]:
                await self.app(scope, receive, watched)
        except TimeoutError:
            if begun:
                raise
            if scope["deadline"].when() == end:
                late = _refusal(408, f"the image did not arrive within {READ_SECONDS:.0f} seconds")
            else:
                late = _refusal(504, "the prediction takes too long; try again")
            await JSONResponse({"detail": late.detail}, late.status_code, late.headers)(scope, receive, send)


COUNT = 10
"""Maximum number of samples."""


def read_samples(folder: Path | None, metadata: Mapping[str, Any], limits: Limits) -> dict[str, bytes]:
    """Return at most `COUNT` image files by name, of a folder or of the dataset in an adapter's metadata.

    Raises:
        UserError: The folder has no images, or one of the chosen images exceeds the limits or is damaged.
    """
    if folder is None:
        return _of_package(str(metadata.get("training", {}).get("dataset", "")))
    from randlora_pl.data.unlabelled import find_images

    files = find_images([folder])
    chosen = [files[number * len(files) // COUNT] for number in range(COUNT)] if len(files) > COUNT else files
    samples = {}
    for number, file in enumerate(chosen, 1):
        try:
            content = file.read_bytes()
            check_header(content, limits)
        except OSError as error:
            raise UserError(f"The sample {file} cannot be read: {error.strerror}.") from error
        except HTTPException as error:
            raise UserError(f"The sample {file} cannot be offered: {error.detail}.") from error
        if len(content) > limits.upload_bytes:
            raise UserError(f"The sample {file} has {len(content):,} bytes; the limit is {limits.upload_bytes:,}.")
        samples[_name(f"{number}-{file.name}")] = content
    return samples


def _of_package(dataset: str) -> dict[str, bytes]:
    """Return one test image of each class of a dataset that needs no files; nothing for other datasets."""
    row = CATALOG.get(dataset)
    if row is None or dataset_path(row, Path()) is not None or not present(row, Path()):
        return {}
    import numpy as np

    from randlora_pl.data.readers import read
    from randlora_pl.data.splits import Splits

    test = Splits(lambda split: read(row, Path(), split)).test
    labels, first = np.unique(test.labels, return_index=True)
    images = {}
    for label, index in list(zip(labels.tolist(), first.tolist(), strict=True))[:COUNT]:
        file = io.BytesIO()
        Image.fromarray(test.images.load(int(test.rows[index])).squeeze()).save(file, "PNG")
        images[_name(f"{test.classes[label]}.png")] = file.getvalue()
    return images


def _name(text: str) -> str:
    """Return a name that needs no quotes in a URL or a shell."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


HEADER_SECONDS = 10.0
"""Maximum time for a client to send the headers of a request."""

_waiting: dict["Connection", asyncio.TimerHandle] = {}  # of this process, oldest first


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
        if len(_waiting) >= 128:
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
        """Handle a request with complete headers.

        Closing a connection with unread bytes resets it, so that a client that is still sending misses the response.
        So the rest of a rejected body is read first, up to twice the limit of an upload; not a body that declares more.
        """
        self._stop_waiting()
        self._requests += 1
        more = True

        async def read() -> Any:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        async def drained(message: Any) -> None:
            if message["type"] == "http.response.start" and (b"connection", b"close") in message["headers"]:
                left = 2 * scope["app"].state.limits.upload_bytes
                declared = dict(scope["headers"]).get(b"content-length", b"")
                if declared.isdigit() and int(declared[:20]) > left:
                    left = 0
                with suppress(TimeoutError):
                    async with asyncio.timeout(10):  # seconds to read the rest of a rejected body
                        while more and left > 0:
                            left -= len((await read()).get("body", b""))
            await send(message)

        try:
            await self._answer(scope, read, drained)
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
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.transport.close()


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
        host = headers.get("host", "")
        name = (host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]).lower()
        ours = name in self.hosts
        if not ours and "*" in self.hosts:
            with suppress(ValueError):
                ours = bool(ipaddress.ip_address(name.strip("[]")))
        if not ours:
            what = "host name not allowed; add it with serve --allow-host NAME"
            return JSONResponse({"detail": what}, 421, close)
        kind, _, given = headers.get("authorization", "").partition(" ")
        known = kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.token)
        scope["trusted"] = known or not self.token
        # The page, which asks for the token, and the ready state without model facts need none.
        if not scope["trusted"] and scope["path"] not in ("/", "/health"):
            what = "send the server's token: Authorization: Bearer TOKEN"
            return JSONResponse({"detail": what}, 401, close | {"WWW-Authenticate": "Bearer"})
        if self.running >= self.most:
            return JSONResponse({"detail": "too many requests at a time; try again"}, 503, close)
        return None
