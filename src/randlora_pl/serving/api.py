"""Classification of uploads in LitServe's workers.

LitServe returns one request's error to all requests of its batch, so no client input may raise in a worker: an image
that cannot be decoded gets its own response.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any

from fastapi import Depends, Response
from fastapi.responses import JSONResponse
from litserve import LitAPI
from litserve.loops import BatchedLoop

from randlora_pl.data.sources import trust_the_limit
from randlora_pl.serving.options import ServerOptions
from randlora_pl.serving.uploads import TAKEN, Upload, read_upload
from randlora_pl.utils.errors import UnreadableImageError, UserError
from randlora_pl.utils.machine import usable_cores, use_precision
from randlora_pl.utils.own_classes import import_named, named_modules

BATCH_PIXELS = 8_000_000
"""Maximum pixels of the images decoded together with the oldest request; decoding them takes a fraction of a second."""


class PatientLoop(BatchedLoop):  # type: ignore[misc]  # LitServe has no types
    """LitServe's batching loop, asleep until there is a request.

    LitServe itself takes a twelfth of a core to poll for requests, and a whole one with a batch timeout of 0. A batch
    is answered together, and a large image takes a second to decode: small ones go first, but each batch has the
    oldest.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[Any, Any, Upload]] = []  # oldest first

    def get_batch_requests(self, lit_api: LitAPI, request_queue: Any, transport: Any) -> Any:
        """Wait for a request, then for more until the batch is full or its time is over."""
        while request_queue.empty() and not self._held:
            time.sleep(0.005)
        late: list[Any] = []
        if len(self._held) < lit_api.max_batch_size and not request_queue.empty():
            more, late = super().get_batch_requests(lit_api, request_queue, transport)
            self._held += more
        chosen = _together([upload.pixels for *_, upload in self._held])[: lit_api.max_batch_size]
        batch = [self._held[index] for index in sorted(chosen)]
        self._held = [request for index, request in enumerate(self._held) if index not in chosen]
        return batch, late


def _together(pixels: Sequence[int]) -> list[int]:
    """Return the images to decode in one batch: the first one, and the smallest others up to `BATCH_PIXELS`."""
    smallest = sorted(range(1, len(pixels)), key=lambda index: pixels[index])
    sums = accumulate(pixels[index] for index in smallest)
    return [0, *(index for index, total in zip(smallest, sums, strict=True) if total <= BATCH_PIXELS)] if pixels else []


class ClassifierAPI(LitAPI):  # type: ignore[misc]
    """Adapter with its model, in each worker; ``most_pixels`` is the maximum width x height of an image."""

    def __init__(self, options: ServerOptions, most_pixels: int) -> None:
        super().__init__(max_batch_size=options.batch_size, batch_timeout=options.batch_timeout, loop=PatientLoop())
        self.adapter, self.precision, self.most_pixels = options.adapter.resolve(), options.precision, most_pixels
        self.threads = max(1, usable_cores() // options.workers)  # of PyTorch in each worker
        self.imports = list(named_modules())  # a worker is a new process
        self.failures = multiprocessing.get_context("spawn").SimpleQueue()  # errors of building the model

    def setup(self, device: str) -> None:
        """Build the model on a device and run it once."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends it after the last response
        end_with_parent()
        try:
            for name in self.imports:
                import_named(name)
            self._build(device)
        except UserError as error:
            self.failures.put(error)
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # LitServe would print a traceback
            raise

    def _build(self, device: str) -> None:
        import torch

        from randlora_pl.models import cast_frozen
        from randlora_pl.tasks import load_task

        torch.set_num_threads(self.threads)
        trust_the_limit()
        self.task = load_task(self.adapter)
        self.frame = self.task.frame
        self.index = torch.device(device)
        self.autocast = use_precision(self.precision, self.index)
        self.task.to(self.index)
        self.task.prepare_evaluation()
        if self.precision == "bf16":
            cast_frozen(self.task.model, torch.bfloat16)  # what autocast would do in each batch
        self._probabilities(torch.zeros(1, 3, self.frame.size, self.frame.size))

    def _probabilities(self, images: Any) -> Any:
        """Return the probabilities (b, classes) on the CPU for images (b, 3, size, size), as `predict` computes them.

        Raises:
            UserError: Probabilities are not finite.
        """
        import torch

        from randlora_pl.tasks.evaluation import check_numbers

        with torch.inference_mode(), self.autocast:
            probabilities = self.task.class_logits(images.to(self.index)).float().softmax(1).cpu()
        check_numbers(probabilities, self.adapter)
        return probabilities

    def decode_request(self, request: Annotated[Upload, Depends(read_upload)]) -> Upload:
        """Return the upload; FastAPI has read it in the HTTP process because of the annotation."""
        return request

    def predict(self, uploads: list[Upload]) -> list[Response]:
        """Return one response per upload, for any content."""
        import torch

        from randlora_pl.data.unlabelled import read_image

        images: list[Any] = []
        answers: list[Response | None] = []
        for upload in uploads:  # only one image in full size at a time
            try:
                images.append(read_image(upload.content, "that was sent", self.frame, TAKEN, self.most_pixels))
                answers.append(None)
            except UserError as error:
                status = 422 if isinstance(error, UnreadableImageError) else 503  # 503: memory ran out
                answers.append(JSONResponse({"detail": error.what}, status))
        try:
            probabilities = iter(self._probabilities(torch.cat(images)) if images else ())
        except UserError as error:
            return [JSONResponse({"detail": str(error)}, 500) for _ in uploads]
        return [
            self._answer(next(probabilities), upload.top_k) if answer is None else answer
            for answer, upload in zip(answers, uploads, strict=True)
        ]

    def _answer(self, probabilities: Any, top_k: int) -> Response:
        best = probabilities.topk(min(top_k, len(probabilities)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        names = self.task.classnames
        return JSONResponse(
            {"classes": [{"name": names[label], "probability": round(value, 6)} for label, value in pairs]}
        )


def end_with_parent(*others: int) -> None:
    """End this process, and others that do not detect it, when its parent is gone, even if the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        for process in others:
            try:
                os.kill(process, 9)
            except OSError:  # already ended
                continue
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
