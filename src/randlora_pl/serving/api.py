"""Classification of uploads in LitServe's workers.

LitServe returns one request's error to all requests of its batch, so no client input may raise in a worker: an image
that cannot be decoded gets its own response.
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from queue import Empty
from typing import Annotated, Any

from fastapi import Depends, Response
from fastapi.responses import JSONResponse
from litserve import LitAPI
from litserve.loops.simple_loops import BatchedLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from randlora_pl.data.images.decode import trust_the_limit
from randlora_pl.serving.images import TAKEN
from randlora_pl.serving.uploads import Upload, read_upload
from randlora_pl.utils.errors import UserError

BATCH_PIXELS = 8_000_000
"""Maximum pixels of the images decoded together with the oldest request; decoding them takes a fraction of a second."""

IDLE_SECONDS = 0.1
"""Timeout of one queue read: if a worker is killed during a read, the queue would give it one more request."""


class PatientLoop(BatchedLoop):  # type: ignore[misc]  # LitServe has no types
    """LitServe's batching loop that blocks for the first request; LitServe itself polls a thousand times a second.

    Large images take a second each to decode, so small ones go first, but each batch has the oldest request.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[Any, Any, float, Upload]] = []  # oldest first

    def get_batch_requests(self, lit_api: LitAPI, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """Wait for a request, then for more until the batch is full or its time is over.

        Returns:
            (queue, id, upload) of the requests to answer, and (queue, id) of requests past their timeout.
        """
        end = time.monotonic()
        if not self._held:
            try:
                self._take(request_queue, IDLE_SECONDS, transport)
            except Empty:
                return [], []
            end = time.monotonic() + lit_api.batch_timeout
        while len(self._held) < lit_api.max_batch_size:
            try:
                self._take(request_queue, max(0.0, end - time.monotonic()), transport)
            except Empty:
                break
        now = time.monotonic()
        late = [(queue, name) for queue, name, since, _ in self._held if now - since > lit_api.request_timeout]
        waiting = [request for request in self._held if now - request[2] <= lit_api.request_timeout]
        chosen = _together([upload.pixels for *_, upload in waiting])
        self._held = [request for index, request in enumerate(waiting) if index not in chosen]
        return [(waiting[index][0], waiting[index][1], waiting[index][3]) for index in sorted(chosen)], late

    def _take(self, request_queue: Any, seconds: float, transport: Any) -> None:
        """Take a request and report to the HTTP process which worker holds it (see `LossAwareTransport`)."""
        request = request_queue.get(timeout=seconds)
        self.put_response(transport, request[0], request[1], (), LitAPIStatus.START, LoopResponseType.REGULAR)
        self._held.append(request)


def _together(pixels: Sequence[int]) -> set[int]:
    """Return the images to decode in one batch: the first one, and the smallest others up to `BATCH_PIXELS`."""
    chosen, left = {0} if pixels else set(), BATCH_PIXELS
    for index in sorted(range(1, len(pixels)), key=lambda index: pixels[index]):
        left -= pixels[index]
        if left < 0:
            break
        chosen.add(index)
    return chosen


class ClassifierAPI(LitAPI):  # type: ignore[misc]
    """Adapter with its model, in each worker.

    Args:
        adapter: Adapter folder or file.
        threads: Threads of PyTorch in each CPU worker.
        failures: Queue for errors of building the model.
        max_batch_size: Maximum images in a batch.
        batch_timeout: Seconds to wait for a batch to fill.
        most_pixels: Maximum pixels (width x height) of an image.
    """

    def __init__(
        self,
        adapter: Path,
        threads: int,
        failures: Any,
        max_batch_size: int,
        batch_timeout: float,
        most_pixels: int,
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, loop=PatientLoop())
        self.adapter, self.threads, self.failures = adapter, threads, failures
        self.most_pixels = most_pixels

    def setup(self, device: str) -> None:
        """Build the model on a device and run it once."""
        end_with_parent()
        try:
            self._build(device)
        except UserError as error:
            self.failures.put(error)
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # LitServe would print a traceback
            raise

    def _build(self, device: str) -> None:
        import torch

        from randlora_pl.adapters import read_adapter
        from randlora_pl.data.unlabelled import frame_of
        from randlora_pl.tasks import load_task

        torch.set_num_threads(self.threads)
        trust_the_limit()
        self.task = load_task(self.adapter)
        self.frame = frame_of(read_adapter(self.adapter).metadata, self.task.image_spec)
        self.index = torch.device(device)
        self.task.to(self.index)
        self.task.prepare_evaluation()
        self._probabilities(torch.zeros(1, 3, self.frame.size, self.frame.size))

    def _probabilities(self, images: Any) -> Any:
        """Return the probabilities (b, classes) on the CPU for images (b, 3, size, size), as `predict` computes them.

        Raises:
            UserError: Probabilities are not finite.
        """
        import torch

        from randlora_pl.tasks.evaluation import check_numbers

        with torch.inference_mode():
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
                answers.append(JSONResponse({"detail": error.what}, 422))
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

    def encode_response(self, output: Response) -> Response:
        """Return the response unchanged."""
        return output


def end_with_parent(*others: int) -> None:
    """End this process when its parent is gone, even if the parent was killed.

    Args:
        others: Process ids to kill as well, because they do not detect it themselves.
    """
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
