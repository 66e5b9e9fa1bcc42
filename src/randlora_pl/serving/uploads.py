"""Uploads in the HTTP process: read with limits on size and time, and checked before classification."""

import asyncio
import io
from dataclasses import dataclass

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from randlora_pl.data.images.decode import FORMATS, known
from randlora_pl.utils.errors import first_line

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


@dataclass(frozen=True)
class Upload:
    """Bytes of an image file, its pixels (width x height), and the number of classes in the response."""

    content: bytes
    pixels: int
    top_k: int


async def read_upload(request: Request) -> Upload:
    """Read the image of a request, from a form field or the body.

    Raises:
        HTTPException: 4xx with a one-line reason.
    """
    limits: Limits = request.app.state.limits
    top_k = _top_k(request.query_params.get("top_k", "5"))
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    form = kind == "multipart/form-data"
    if not form and not kind.startswith("image/") and kind != "application/octet-stream":
        ways = f"a form (multipart/form-data) with the field {FIELD!r}, or as the body with Content-Type: image/..."
        raise _refusal(415, f"send the image as {ways}")
    declared = request.headers.get("content-length", "")
    bounded = Request(request.scope, _bounded(request.receive, limits))
    try:
        if declared.isdecimal() and int(declared) > limits.upload_bytes:
            raise _too_large(limits)
        content = await (_field(bounded) if form else bounded.body())
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed") from None  # the client is gone
    deadline: asyncio.Timeout = request.scope["deadline"]
    deadline.reschedule(asyncio.get_running_loop().time() + ANSWER_SECONDS)
    pixels = await run_in_threadpool(check_header, content, limits)  # other requests are read meanwhile
    return Upload(content, pixels, top_k)


def check_header(content: bytes, limits: Limits) -> int:
    """Check the image format and the declared size, and return width x height; Pillow decodes nothing.

    Raises:
        HTTPException: The upload is refused, with status 400, 413, 415 or 422.
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


async def _field(request: Request) -> bytes:
    """Return the content of the form's field."""
    async with request.form(max_files=1, max_fields=10) as form:
        value = form.get(FIELD)
        if not isinstance(value, UploadFile):
            what = "holds text, not a file" if FIELD in form else "is missing"
            raise HTTPException(400, f"the form's field {FIELD!r} {what}; for example: curl -F {FIELD}=@photo.jpg")
        return await value.read()


def _top_k(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text[:9]) > 0):
        raise HTTPException(400, "top_k must be a positive whole number")
    return int(text[:9])


def _bounded(receive: Receive, limits: Limits) -> Receive:
    """Wrap ``receive`` to raise after too many bytes; a body sent in chunks declares no length."""
    total = 0

    async def read() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limits.upload_bytes:
            raise _too_large(limits)
        return message

    return read


def _too_large(limits: Limits) -> HTTPException:
    return _refusal(413, f"the upload is larger than the {limits.upload_bytes / 1e6:g} MB that are allowed")


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
            await send(message)  # reads the rest of a refused body first, see `Connection`
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
