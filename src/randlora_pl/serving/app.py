"""LitServe's server with a page, model facts, deadlines and an orderly shutdown, and the workers that classify uploads.

LitServe returns one request's error to all requests of its batch, so no client input may raise in a worker: an image
that cannot be decoded gets its own response.
"""

import asyncio
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from importlib import resources
from itertools import accumulate
from mimetypes import guess_type
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from litserve import LitAPI, LitServer
from litserve.loops import BatchedLoop
from litserve.utils import LitAPIStatus, WorkerSetupStatus
from starlette.routing import Route

from randlora_pl.adapters import AdapterFile
from randlora_pl.data.sources import trust_the_limit
from randlora_pl.data.unlabelled import read_image
from randlora_pl.models import cast_frozen
from randlora_pl.serving import ServerOptions
from randlora_pl.serving.on_demand import Shelf, list_names
from randlora_pl.serving.uploads import TAKEN, Connection, Deadline, Gate, Limits, Upload, read_upload
from randlora_pl.tasks import load_task
from randlora_pl.tasks.losses import check_numbers
from randlora_pl.tasks.restore import plain_task
from randlora_pl.tasks.task_set import TaskSet
from randlora_pl.utils.errors import LostProcessError, Terminated, UnreadableImageError, UserError
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
        pixels = [upload.pixels for *_, upload in self._held]
        smallest = sorted(range(1, len(pixels)), key=lambda index: pixels[index])
        sums = accumulate(pixels[index] for index in smallest)
        chosen = [0, *(index for index, total in zip(smallest, sums, strict=True) if total <= BATCH_PIXELS)]
        del chosen[lit_api.max_batch_size :]
        batch = [request for index, request in enumerate(self._held) if index in chosen]
        self._held = [request for index, request in enumerate(self._held) if index not in chosen]
        return batch, late


class ClassifierAPI(LitAPI):  # type: ignore[misc]
    """Adapters with their model, in each worker; ``most_pixels`` is the maximum width x height of an image.

    For a folder of adapters, ``base`` is one with their base model; its tensors are not needed.
    """

    def __init__(self, options: ServerOptions, most_pixels: int, base: AdapterFile | None = None) -> None:
        super().__init__(max_batch_size=options.batch_size, batch_timeout=options.batch_timeout, loop=PatientLoop())
        self.options, self.most_pixels, self.base = options, most_pixels, base
        self.adapter = (options.adapter or Path()).resolve()
        self.threads = max(1, usable_cores() // options.workers)  # of PyTorch in each worker
        self.imports = list(named_modules())  # a worker is a new process
        self.failures = multiprocessing.get_context("spawn").SimpleQueue()  # errors of building the model
        self.most_held = multiprocessing.get_context("spawn").Value("q", 0)  # bytes of adapters in a worker

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
        torch.set_num_threads(self.threads)
        trust_the_limit()
        self.index = torch.device(device)
        self.autocast = use_precision(self.options.precision, self.index)
        self.shelf: Shelf | None = None
        if self.base is not None and self.options.adapters is not None:  # in float32: adapters may change any weight
            tasks = TaskSet(plain_task(self.base))
            tasks.first.to(self.index).eval()
            limit = round(self.options.adapter_memory * 1e6)
            self.shelf, self.tasks = Shelf(self.options.adapters.resolve(), tasks, limit), tasks.tasks
            return
        task = load_task(self.adapter)
        task.to(self.index)
        task.prepare_evaluation()
        if self.options.precision == "bf16":
            cast_frozen(task.model, torch.bfloat16)  # what autocast would do in each batch
        self.tasks = {"": task}
        self._probabilities({Upload(b"", 0, 1): torch.zeros(1, 3, task.frame.size, task.frame.size)})

    def _probabilities(self, ready: Mapping[Upload, Any]) -> list[Any]:
        """Return the probabilities (classes,) on the CPU of uploads with images (1, 3, size, size), as in `predict`."""
        images = torch.cat([*ready.values()]).to(self.index)
        with torch.inference_mode(), self.autocast:
            if self.shelf is not None:
                return self.shelf.tasks.probabilities(images, [upload.adapter for upload in ready])
            return list(self.tasks[""].predictions(self.tasks[""].class_logits(images)).cpu())

    def decode_request(self, request: Annotated[Upload, Depends(read_upload)]) -> Upload:
        """Return the upload; FastAPI has read it in the HTTP process because of the annotation."""
        return request

    def predict(self, uploads: list[Upload]) -> list[Response]:
        """Return one response per upload, for any content; as many adapters as fit into memory share a forward pass."""
        answers: dict[Upload, Response] = {}
        ready: dict[Upload, Any] = {}  # images
        for name in dict.fromkeys(upload.adapter for upload in uploads):
            own, kept = [upload for upload in uploads if upload.adapter == name], {each.adapter for each in ready}
            try:
                task = self.tasks[""] if self.shelf is None else self.shelf.take(name, kept)
            except HTTPException as error:
                answers |= {upload: JSONResponse({"detail": error.detail}, error.status_code) for upload in own}
                continue
            for upload in own:  # only one image in full size at a time
                try:
                    ready[upload] = read_image(upload.content, "that was sent", task.frame, TAKEN, self.most_pixels)
                except UserError as error:
                    status = 422 if isinstance(error, UnreadableImageError) else 503  # 503: memory ran out
                    answers[upload] = JSONResponse({"detail": error.what}, status)
            if self.shelf is not None and not self.shelf.shrink({*kept, name}):
                answers |= self._answer(ready)
                ready = {}
                self.shelf.shrink()
        answers |= self._answer(ready)
        if self.shelf is not None:
            self.most_held.value = max(self.most_held.value, self.shelf.held)
        return [answers[upload] for upload in uploads]

    def _answer(self, ready: Mapping[Upload, Any]) -> dict[Upload, Response]:
        """Return the responses to uploads with prepared images."""
        answers: dict[Upload, Response] = {}
        for upload, row in zip(ready, self._probabilities(ready) if ready else [], strict=True):
            task = self.tasks[upload.adapter]
            try:
                check_numbers(row, upload.adapter or str(self.adapter))
            except UserError as error:
                answers[upload] = JSONResponse({"detail": str(error)}, 500)
                continue
            best = row.topk(min(upload.top_k, len(task.classnames)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            classes = [{"name": task.classnames[label], "probability": round(value, 6)} for label, value in pairs]
            answers[upload] = JSONResponse({"classes": classes})
        return answers


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


REQUESTS = 128
"""Maximum concurrent requests, each with one upload in memory; further ones get 503."""
CHECK_SECONDS = 0.5
"""Time between two checks of the workers."""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
_POLICY += "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"


class Server(LitServer):  # type: ignore[misc]  # LitServe has no types
    """LitServe's server, which notices workers that are lost while they build the model or hold requests."""

    ready_text, ending = "", False
    helpers: tuple[int, ...] = ()

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the HTTP process, from start to shutdown."""
        end_with_parent(*self.helpers)
        async with super().lifespan(app):
            watch = asyncio.create_task(answer_lost_requests(self))
            print(self.ready_text, flush=True)
            yield
            watch.cancel()

    def verify_worker_status(self) -> None:
        """Wait until a worker has built its model; LitServe waits forever if one is killed before.

        Raises:
            UserError: The model cannot be built.
            LostProcessError: A worker was lost.
        """
        others = set(multiprocessing.active_children()) - set(self.inference_workers)  # of LitServe, for its queues
        self.helpers = tuple(child.pid for child in others if child.pid)
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `run_server`
        while not any(status == WorkerSetupStatus.READY for status in self.workers_setup_status.values()):
            codes = [worker.exitcode for worker in self.inference_workers if not worker.is_alive()]
            if codes and not self.lit_api.failures.empty():
                raise self.lit_api.failures.get()
            if codes:
                raise LostProcessError(f"a worker that was building the model (exit code {codes[0]}): out of memory?")
            time.sleep(0.05)

    def launch_single_inference_worker(self, lit_api: ClassifierAPI, worker_id: int) -> Any:
        """Replace a lost worker; called in LitServe's monitoring thread."""
        if self.ending:
            sys.exit()  # the thread
        print(f"Worker {worker_id} was lost; starting another one", file=sys.stderr, flush=True)
        if sys.platform != "win32":  # this thread; the worker inherits it, see `run_server`
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return super().launch_single_inference_worker(lit_api, worker_id)


async def answer_lost_requests(server: Server) -> None:
    """Answer requests of lost workers with 503; LitServe lets them wait forever after it replaced a worker."""
    reason = "the process that classified this image was lost; send the image again in a few seconds"
    while True:
        await asyncio.sleep(CHECK_SECONDS)
        states = await asyncio.to_thread(server.workers_setup_status.items)
        lost = {int(name.rpartition("_")[2]) for name, state in states if state != WorkerSetupStatus.READY}
        for item in server.response_buffer.values():
            if item.worker_id in lost and not item.event.is_set():
                item.response = HTTPException(503, reason, {"Retry-After": "5"}), LitAPIStatus.ERROR
                item.event.set()


def _add_pages(server: Server, options: ServerOptions, facts: dict[str, Any], samples: Mapping[str, bytes]) -> None:
    """Add the page, its samples and the model's facts before LitServe's own routes, which return one word."""
    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=headers)

    async def health(request: Request) -> Response:
        ready = all(status == WorkerSetupStatus.READY for status in server.workers_setup_status.values())
        shown = facts if request.scope["trusted"] else {}
        if shown and (folder := server.app.state.folder) is not None:
            memory = {"limit": round(options.adapter_memory * 1e6), "most_held": server.lit_api.most_held.value}
            shown = shown | {"adapters": await asyncio.to_thread(list_names, folder), "adapter_bytes": memory}
        return JSONResponse({"status": "ready" if ready else "a worker is starting", **shown}, 200 if ready else 503)

    async def sample(request: Request) -> Response:
        name = request.path_params["name"]
        content = samples.get(name)
        if content is None:
            return JSONResponse({"detail": "no such sample; GET /health lists them"}, 404)
        return Response(content, media_type=guess_type(name)[0], headers=headers)

    routes = [Route("/", index), Route("/health", health), Route("/samples/{name}", sample)]
    server.app.router.routes[:0] = routes


def run_server(
    options: ServerOptions,
    facts: dict[str, Any],
    ready: str,
    device: Any,
    limits: Limits,
    hosts: Collection[str],
    samples: Mapping[str, bytes],
    base: AdapterFile | None = None,
) -> None:
    """Serve requests until a signal; all started processes have ended when it returns.

    ``options`` come from the command, ``facts`` go to ``/health`` and ``/info``, ``ready`` is printed, and ``samples``
    are offered on the page. ``base`` is one of several adapters.

    Raises:
        UserError: The model cannot be built.
        LostProcessError: A required process has ended.
        KeyboardInterrupt: Ctrl-C ended it; `Terminated` after SIGTERM.
    """
    facts = facts | {"samples": list(samples)}
    server = Server(
        ClassifierAPI(options, limits.pixels, base),
        accelerator=device.type,
        devices=1 if device.type == "cpu" else [device.index or 0],
        workers_per_device=options.workers,
        timeout=30.0,  # seconds to wait for a worker; after it the response is 504
        model_metadata=facts,
        middlewares=[Deadline, (Gate, {"hosts": hosts, "token": options.token, "most": REQUESTS})],
        disable_openapi_url=True,  # its page loads third-party scripts
        restart_workers=True,
    )
    server.ready_text, server.uvicorn_graceful_timeout, server.monitor_internal = ready, 5, CHECK_SECONDS
    server.app.state.limits = limits
    server.app.state.folder = options.adapters and options.adapters.resolve()
    _add_pages(server, options, facts, samples)
    before = set(multiprocessing.active_children())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own, stopped = os.getpid(), KeyboardInterrupt()

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if os.getpid() != own or server.ending:  # a forked process, or a second Ctrl-C
            return
        server.ending = True
        logging.getLogger("litserve").setLevel(logging.CRITICAL)
        stopped = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise stopped

    for number in handlers:
        signal.signal(number, stop)
    if sys.platform != "win32":  # the workers inherit it: this process ends them after the last response
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    trust_the_limit()
    gc.collect()
    gc.freeze()  # else garbage collection copies pages in each forked process, 80 MB each
    try:
        server.run(
            host=options.host,
            port=options.port,
            num_api_servers=1,
            log_level="warning",
            generate_client_file=False,
            http=Connection,
            server_header=False,
        )
    except (EOFError, ConnectionError) as error:
        raise LostProcessError(f"the one that holds LitServe's queues ({error!r}); start the server again") from None
    finally:
        server.ending = True
        gc.unfreeze()
        children = set(multiprocessing.active_children()) - before
        for child in children:
            child.terminate()
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise stopped
