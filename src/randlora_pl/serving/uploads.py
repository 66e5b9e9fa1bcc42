"""Images in the HTTP process: uploads, read with limits on size and time, and samples that the page offers.

Samples are public to everyone who reaches the server. So they come from a folder that the operator names, or from a
dataset that an installed package ships; images of any other dataset stay where they are.
"""

import asyncio
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image, UnidentifiedImageError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from randlora_pl.data.catalog.registry import CATALOG, dataset_path, present
from randlora_pl.data.sources import FORMATS, known
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


COUNT = 10
"""Maximum number of samples."""


def read_samples(folder: Path | None, metadata: Mapping[str, Any], limits: Limits) -> dict[str, bytes]:
    """Return image files by name, at most `COUNT`.

    Args:
        folder: Folder of images; None for images of the dataset in the metadata.
        metadata: Metadata of the adapter.
        limits: Limits of an upload, which hold for samples too.

    Raises:
        UserError: The folder has no images, or one of the chosen images exceeds the limits or is damaged.
    """
    if folder is None:
        return _of_package(str(metadata.get("training", {}).get("dataset", "")))
    from randlora_pl.data.unlabelled import find_images

    files = find_images([folder])
    chosen = [files[number * len(files) // COUNT] for number in range(COUNT)] if len(files) > COUNT else files
    return {_name(f"{number}-{file.name}"): _read(file, limits) for number, file in enumerate(chosen, 1)}


def _read(file: Path, limits: Limits) -> bytes:
    try:
        content = file.read_bytes()
        check_header(content, limits)
    except OSError as error:
        raise UserError(f"The sample {file} cannot be read: {error.strerror}.") from error
    except HTTPException as error:
        raise UserError(f"The sample {file} cannot be offered: {error.detail}.") from error
    if len(content) > limits.upload_bytes:
        raise UserError(f"The sample {file} has {len(content):,} bytes; the limit is {limits.upload_bytes:,}.")
    return content


def _of_package(dataset: str) -> dict[str, bytes]:
    """Return one test image of each class of a dataset that needs no files; nothing for other datasets."""
    row = CATALOG.get(dataset)
    if row is None or dataset_path(row, Path()) is not None or not present(row, Path()):
        return {}
    import numpy as np

    from randlora_pl.data.readers.dispatch import read
    from randlora_pl.data.splits import Splits

    test = Splits(lambda split: read(row, Path(), split)).test
    labels, first = np.unique(test.labels, return_index=True)
    found = {}
    for label, index in list(zip(labels.tolist(), first.tolist(), strict=True))[:COUNT]:
        file = io.BytesIO()
        Image.fromarray(test.images.load(int(test.rows[index])).squeeze()).save(file, "PNG")
        found[_name(f"{test.classes[label]}.png")] = file.getvalue()
    return found


def _name(text: str) -> str:
    """Return a name that needs no quotes in a URL or a shell."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)
