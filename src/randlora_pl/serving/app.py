"""The server: LitServe's, with a page, facts about the model, deadlines, and an orderly end."""

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
from randlora_pl.serving.api import Classifier, end_with_parent
from randlora_pl.serving.connections import Connection
from randlora_pl.serving.gate import Gate
from randlora_pl.serving.images import Limits
from randlora_pl.serving.losses import LossAwareTransport
from randlora_pl.serving.uploads import Deadline
from randlora_pl.utils.errors import LostProcessError, Terminated

QUEUE_SECONDS = 30.0
"""How long a request may wait for a worker; then it is answered with 504."""

REQUESTS = 128
"""Requests at a time; further ones are answered with 503. Each may hold one upload in memory."""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
_POLICY += "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"


class Server(LitServer):  # type: ignore[misc]  # LitServe has no types
    """LitServe's server.

    Args:
        api: What classifies.
        device: A device as PyTorch calls it.
        workers: Processes that classify.
        facts: What ``/health`` and ``/info`` say of the model.
        limits: What an upload may cost.
        ready: What to print once requests are answered.
        hosts: Names that it may be called by (see `Gate`).
        token: What requests must have; empty: nothing.
    """

    _transport: Any  # LitServe's, of messages from workers

    def __init__(
        self,
        api: Classifier,
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
            disable_openapi_url=True,  # its page loads scripts from elsewhere
            restart_workers=True,
        )
        self.facts, self.ready, self.ending = facts, ready, False
        self.uvicorn_graceful_timeout = 5
        self.monitor_internal = 0.5  # seconds between two looks at the workers
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

        # Before LitServe's own routes of these names, which answer with a word.
        self.app.router.routes[:0] = [Route("/", index), Route("/health", health)]

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The time in which the HTTP process answers."""
        end_with_parent(*self.helpers)
        self._transport = LossAwareTransport(self._transport, self.response_buffer)
        async with super().lifespan(app):
            print(self.ready, flush=True)
            yield

    def launch_inference_worker(self, lit_api: Classifier) -> Any:
        """Starts the workers, which a Ctrl-C does not reach: this process ends them when all is answered."""
        self.helpers = [child.pid for child in multiprocessing.active_children() if child.pid]  # LitServe's queues
        with _unheard(signal.SIGINT):
            return super().launch_inference_worker(lit_api)

    def verify_worker_status(self) -> None:
        """Waits until a worker has built its model; LitServe waits for ever where one is killed before.

        Raises:
            UserError: It cannot be built.
            LostProcessError: A worker was lost.
        """
        while not any(status == WorkerSetupStatus.READY for status in self.workers_setup_status.values()):
            codes = [worker.exitcode for worker in self.inference_workers if not worker.is_alive()]
            if codes and not self.lit_api.failures.empty():
                raise self.lit_api.failures.get()
            if codes:
                raise LostProcessError(f"a worker that was building the model (exit code {codes[0]}): out of memory?")
            time.sleep(0.05)

    def launch_single_inference_worker(self, lit_api: Classifier, worker_id: int) -> Any:
        """Starts a worker in the place of one that was lost; called in LitServe's watching thread."""
        if self.ending:
            sys.exit()  # the thread
        print(f"Worker {worker_id} was lost; starting another one", file=sys.stderr, flush=True)
        self._transport.send(worker_id, 0)  # see `LossAwareTransport`
        with _unheard(signal.SIGINT):
            return super().launch_single_inference_worker(lit_api, worker_id)


@contextmanager
def _unheard(number: signal.Signals) -> Iterator[None]:
    """Blocks a signal in this thread, and for good in the processes that it starts."""
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
    """Answers requests until it is told to end; every process that it started has ended then.

    Args:
        adapter: The adapter folder or file.
        facts: What to tell of the model.
        ready: What to print once requests are answered.
        device: Where the model is.
        limits: What an upload may cost.
        host: Address to listen at.
        port: Port to listen at.
        workers: Processes that classify.
        threads: Of PyTorch in each worker.
        batch_size: Images of a batch at most.
        batch_timeout: Seconds to wait for a batch to fill.
        hosts: Names that it may be called by (see `Gate`).
        token: What requests must have; empty: nothing.

    Raises:
        UserError: The model cannot be built.
        LostProcessError: A process that it cannot do without is gone.
        KeyboardInterrupt: It was ended by Ctrl-C; `Terminated` by SIGTERM.
    """
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    api = Classifier(adapter, threads, failures, batch_size, batch_timeout, limits.pixels)
    server = Server(api, device, workers, facts, limits, ready, hosts, token)
    before = set(multiprocessing.active_children())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    own, stopped = os.getpid(), KeyboardInterrupt()

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if os.getpid() != own or server.ending:  # a process forked from this one; or a second Ctrl-C
            return
        server.ending = True
        logging.getLogger("litserve").setLevel(logging.CRITICAL)
        stopped = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise stopped

    for number in handlers:
        signal.signal(number, stop)
    trust_the_limit()
    gc.collect()
    gc.freeze()  # else the collector writes to all that is here, in each process forked from this one: 80 MB a copy
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
    """Ends processes, in 5 seconds at most."""
    for child in children:
        child.terminate()
    for child in children:
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()
