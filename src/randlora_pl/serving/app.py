"""LitServe's server with a page, model facts, deadlines, and an orderly shutdown."""

import gc
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from litserve import LitServer
from litserve.utils import WorkerSetupStatus
from starlette.routing import Route

from randlora_pl.data.images.decode import trust_the_limit
from randlora_pl.serving.api import ClassifierAPI, end_with_parent
from randlora_pl.serving.connections import Connection
from randlora_pl.serving.gate import Gate
from randlora_pl.serving.images import Limits
from randlora_pl.serving.losses import LossAwareTransport
from randlora_pl.serving.uploads import Deadline
from randlora_pl.utils.errors import LostProcessError, Terminated

QUEUE_SECONDS = 30.0
"""Maximum wait of a request for a worker; after it the response is 504."""

REQUESTS = 128
"""Maximum concurrent requests, each with one upload in memory; further ones get 503."""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
_POLICY += "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"


class Server(LitServer):  # type: ignore[misc]  # LitServe has no types
    """LitServe's server with this application's routes and limits.

    Args:
        api: Classifier in the workers.
        device: PyTorch device.
        workers: Number of worker processes.
        facts: Facts about the model for ``/health`` and ``/info``.
        limits: Limits of an upload.
        ready: Text to print when the server is ready.
        hosts: Accepted host names (see `Gate`).
        token: Required token; empty disables the check.
    """

    _transport: Any  # LitServe's, of messages from workers

    def __init__(
        self,
        api: ClassifierAPI,
        device: Any,
        workers: int,
        facts: dict[str, Any],
        limits: Limits,
        ready: str,
        hosts: Collection[str],
        token: str,
    ) -> None:
        super().__init__(
            api,
            accelerator=device.type,
            devices=1 if device.type == "cpu" else [device.index or 0],
            workers_per_device=workers,
            timeout=QUEUE_SECONDS,
            model_metadata=facts,
            middlewares=[Deadline, (Gate, {"hosts": hosts, "token": token, "most": REQUESTS})],
            disable_openapi_url=True,  # its page loads third-party scripts
            restart_workers=True,
        )
        self.facts, self.ready, self.ending = facts, ready, False
        self.uvicorn_graceful_timeout = 5
        self.monitor_internal = 0.5  # seconds between checks of the workers
        self.helpers: list[int] = []
        self.app.state.limits = limits
        page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}

        async def index(request: Request) -> Response:
            return HTMLResponse(page, headers=headers)

        async def health(request: Request) -> Response:
            ready = all(status == WorkerSetupStatus.READY for status in self.workers_setup_status.values())
            shown = facts if request.scope["trusted"] else {}
            return JSONResponse(
                {"status": "ready" if ready else "a worker is starting", **shown}, 200 if ready else 503
            )

        # Placed before LitServe's routes of the same names, which return one word.
        self.app.router.routes[:0] = [Route("/", index), Route("/health", health)]

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the HTTP process, from start to shutdown."""
        end_with_parent(*self.helpers)
        self._transport = LossAwareTransport(self._transport, self.response_buffer)
        async with super().lifespan(app):
            print(self.ready, flush=True)
            yield

    def launch_inference_worker(self, lit_api: ClassifierAPI) -> Any:
        """Start the workers with Ctrl-C blocked: this process ends them after the last response."""
        self.helpers = [child.pid for child in multiprocessing.active_children() if child.pid]  # LitServe's queues
        with _unheard(signal.SIGINT):
            return super().launch_inference_worker(lit_api)

    def verify_worker_status(self) -> None:
        """Wait until a worker has built its model; LitServe waits forever if one is killed before.

        Raises:
            UserError: The model cannot be built.
            LostProcessError: A worker was lost.
        """
        while not any(status == WorkerSetupStatus.READY for status in self.workers_setup_status.values()):
            codes = [worker.exitcode for worker in self.inference_workers if not worker.is_alive()]
            if codes and not self.lit_api.failures.empty():
                raise self.lit_api.failures.get()
            if codes:
                raise LostProcessError(f"a worker that was building the model (exit code {codes[0]}): out of memory?")
            time.sleep(0.05)

    def launch_single_inference_worker(self, lit_api: ClassifierAPI, worker_id: int) -> Any:
        """Restart a lost worker; called in LitServe's monitoring thread."""
        if self.ending:
            sys.exit()  # the thread
        print(f"Worker {worker_id} was lost; starting another one", file=sys.stderr, flush=True)
        self._transport.send(worker_id, 0)  # see `LossAwareTransport`
        with _unheard(signal.SIGINT):
            return super().launch_single_inference_worker(lit_api, worker_id)


@contextmanager
def _unheard(number: signal.Signals) -> Iterator[None]:
    """Block a signal in this thread and in the processes it starts."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(
    adapter: Path,
    facts: dict[str, Any],
    ready: str,
    *,
    device: Any,
    limits: Limits,
    host: str,
    port: int,
    workers: int,
    threads: int,
    batch_size: int,
    batch_timeout: float,
    hosts: Collection[str],
    token: str,
) -> None:
    """Serve requests until a signal; all started processes have ended when it returns.

    Args:
        adapter: Adapter folder or file.
        facts: Facts about the model.
        ready: Text to print when the server is ready.
        device: PyTorch device of the model.
        limits: Limits of an upload.
        host: Address to listen on.
        port: Port to listen on.
        workers: Number of worker processes.
        threads: Threads of PyTorch in each worker.
        batch_size: Maximum images in a batch.
        batch_timeout: Seconds to wait for a batch to fill.
        hosts: Accepted host names (see `Gate`).
        token: Required token; empty disables the check.

    Raises:
        UserError: The model cannot be built.
        LostProcessError: A required process has ended.
        KeyboardInterrupt: Ctrl-C ended it; `Terminated` after SIGTERM.
    """
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    api = ClassifierAPI(adapter, threads, failures, batch_size, batch_timeout, limits.pixels)
    server = Server(api, device, workers, facts, limits, ready, hosts, token)
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
    trust_the_limit()
    gc.collect()
    gc.freeze()  # else garbage collection copies pages in each forked process, 80 MB each
    try:
        server.run(
            host=host,
            port=port,
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
        _end(set(multiprocessing.active_children()) - before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise stopped


def _end(children: set[Any]) -> None:
    """End processes within 5 seconds."""
    for child in children:
        child.terminate()
    for child in children:
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()
