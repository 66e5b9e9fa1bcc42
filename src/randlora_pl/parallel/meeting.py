"""Questions and answers of processes before they train, through the store for rendezvous: each wait ends."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from randlora_pl.utils.errors import LostProcessError, UserError, first_line

GRACE = 30.0
"""Seconds that the process with the store waits for the others to read why the job ends."""
_LEFT = "left"
Ask = Callable[[str], list[str]]
"""Function that returns the answers of all processes to a question, by rank."""


class Meeting:
    """Processes of a job that compare what they have, before any tensor is exchanged.

    Args:
        store: The store for rendezvous.
        rank: Rank of this process.
        world: Number of processes.
        timeout: Seconds to wait for another process.

    Attributes:
        trains: True once the training has begun: nothing waits at the store then.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float) -> None:
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.trains = False
        self._asked = 0

    def awaited(self, key: str, rank: int, longer: float = 0.0) -> str:
        """Return what a process has written under a key of the store, once it is there.

        Args:
            key: The key.
            rank: Process that writes it.
            longer: Seconds to wait beyond the timeout.

        Raises:
            UserError: A process has left the job because of a mistake.
            LostProcessError: A process has left for another reason, or wrote nothing in time.
        """
        deadline, pause = time.monotonic() + self.timeout + longer, 0.01
        try:
            while not self.store.check([key]):
                if self.store.check([_LEFT]):
                    self._end(json.loads(self.store.get(_LEFT)))
                if time.monotonic() > deadline:
                    raise LostProcessError(f"process {rank}, which did not arrive within {self.timeout:g} s")
                time.sleep(pause)
                pause = min(0.25, 1.5 * pause)
            return bytes(self.store.get(key)).decode()
        except RuntimeError as error:  # also PyTorch's DistNetworkError
            raise LostProcessError(f"process 0, through which the others meet ({first_line(error)})") from error

    def compare(self, answer: Callable[[str], str], judge: Callable[[Ask], str]) -> None:
        """Let rank 0 ask all processes until it has found whether they agree.

        Args:
            answer: Returns this process's answer to a question.
            judge: Called on rank 0; returns the difference, or an empty string.

        Raises:
            UserError: They differ; the message is the same in all processes. See also `awaited`.
        """
        if self.rank == 0:
            verdict = judge(lambda question: self._ask(question, answer))
            self._post("end", verdict)
        else:
            question = self._next()
            while question["kind"] == "ask":
                self.store.set(self._key(self.rank), answer(question["text"]))
                question = self._next()
            verdict = question["text"]
        if verdict:
            self._mark_read()
            raise UserError(verdict)

    def leave(self, why: str, lost: bool) -> None:
        """Let the processes that wait for this one end, with the reason.

        Args:
            why: The reason.
            lost: True if the reason is not a mistake of the user.
        """
        with suppress(RuntimeError):
            if not self.store.check([_LEFT]):
                self.store.set(_LEFT, json.dumps({"rank": self.rank, "why": why, "lost": lost}))
            self._mark_read()

    def _end(self, left: dict[str, Any]) -> None:
        """Raise the error of a process that has left."""
        self._mark_read()
        if left["lost"]:
            raise LostProcessError(f"process {left['rank']}, which has ended: {left['why']}")
        raise UserError(f"process {left['rank']} has ended: {left['why']}")

    def _mark_read(self) -> None:
        """Record that this process ends; rank 0, which may have the store, waits for the others to do so."""
        self.store.set(f"{_LEFT}/{self.rank}", "")
        until = time.monotonic() + GRACE
        everyone = [f"{_LEFT}/{rank}" for rank in range(self.world)]
        while self.rank == 0 and time.monotonic() < until and not self.store.check(everyone):
            time.sleep(0.05)

    def _ask(self, question: str, answer: Callable[[str], str]) -> list[str]:
        self._post("ask", question)
        return [answer(question), *(self.awaited(self._key(rank), rank) for rank in range(1, self.world))]

    def _post(self, kind: str, text: str) -> None:
        self._asked += 1
        self.store.set(self._key("question"), json.dumps({"kind": kind, "text": text}))

    def _next(self) -> dict[str, str]:
        self._asked += 1
        question: dict[str, str] = json.loads(self.awaited(self._key("question"), 0, longer=GRACE))
        return question

    def _key(self, what: object) -> str:
        return f"meeting/{self._asked}/{what}"
