"""Answers to the requests that a lost worker held.

The process that starts workers sees that one is gone, but the requests wait in the HTTP process: LitServe itself would
let them wait for ever.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from litserve.transport.base import MessageTransport
from litserve.utils import LitAPIStatus

RETRY_SECONDS = 5
"""After which a client should ask again: about the time in which a worker builds its model."""


class LossAwareTransport(MessageTransport):  # type: ignore[misc]  # LitServe has no types
    """LitServe's messages from workers to the HTTP process, among which a bare number is that of a lost worker.

    All are in one queue, so that a loss is read after the last message of the worker that was lost.

    Args:
        transport: LitServe's.
        waiting: Requests without an answer, by id.
    """

    def __init__(self, transport: Any, waiting: Mapping[str, Any]) -> None:
        self.transport, self.waiting = transport, waiting

    def send(self, item: Any, consumer_id: int) -> None:
        """Send a message to the HTTP process."""
        self.transport.send(item, consumer_id)

    async def areceive(self, *args: Any, **options: Any) -> Any:
        """Return the next message of a worker, or None if none has come."""
        message = await self.transport.areceive(*args, **options)
        if not isinstance(message, int):
            return message
        reason = "the process that classified this image was lost; send the image again in a few seconds"
        for item in self.waiting.values():
            if item.worker_id == message and not item.event.is_set():
                error = HTTPException(503, reason, {"Retry-After": str(RETRY_SECONDS)})
                item.response = error, LitAPIStatus.ERROR
                item.event.set()
        return None

    def close(self, **options: Any) -> None:
        """End the waiting for messages."""
        self.transport.close(**options)
