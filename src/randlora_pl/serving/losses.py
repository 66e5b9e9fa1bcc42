"""Responses to requests held by a lost worker.

The process that starts workers detects the loss, but the requests wait in the HTTP process; LitServe would let them
wait forever.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from litserve.transport.base import MessageTransport
from litserve.utils import LitAPIStatus

RETRY_SECONDS = 5
"""Retry-After of a lost request: about the time in which a worker builds its model."""


class LossAwareTransport(MessageTransport):  # type: ignore[misc]  # LitServe has no types
    """LitServe's messages from workers to the HTTP process; a bare number is the id of a lost worker.

    One queue has them all, so a loss is read after the last message of the lost worker.

    Args:
        transport: LitServe's transport.
        waiting: Requests without an answer, by id.
    """

    def __init__(self, transport: Any, waiting: Mapping[str, Any]) -> None:
        self.transport, self.waiting = transport, waiting

    def send(self, item: Any, consumer_id: int) -> None:
        """Send a message to the HTTP process."""
        self.transport.send(item, consumer_id)

    async def areceive(self, *args: Any, **options: Any) -> Any:
        """Return the next message of a worker, or None if there is none."""
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
        """Close the transport."""
        self.transport.close(**options)
