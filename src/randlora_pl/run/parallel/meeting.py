"""Questions and answers of processes before they train, through the store for rendezvous: each wait ends."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from randlora_pl.utils.errors import LostProcessError, UserError, first_line

GRACE = 30.0
"""Seconds that the process with the store waits for the others to read why the job ends."""
_END = "the end of a comparison"
Ask = Callable[[str], list[str]]
"""Function that returns the answers of all processes to a question, by rank."""


class Meeting:
    """Processes of a job that compare what they have, before any tensor is exchanged.

    Rank 0 posts numbered questions and decisions, and the others read them in this order.

    Args:
        store: The store for rendezvous.
        rank: Rank of this process.
        world: Number of processes.
        timeout: Seconds to wait for another process.

    Attributes:
        exchanges: True while the processes exchange tensors: nothing waits at the store then.
    """

    def __init__(self, store: Any, rank: int, world: int, timeout: float) -> None:
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self._run = 0
        self.begin()

    def begin(self) -> None:
        """Begin another run, which no process has left."""
        self._run += 1
        self._asked, self.exchanges = 0, False

    def decided(self, what: str, decide: Callable[[], str]) -> str:
        """Return rank 0's decision.

        Args:
            what: Name of the decision.
            decide: Called on rank 0 only.

        Raises:
            UserError: See `awaited`; this process is at another decision than rank 0.
        """
        if self.rank != 0:
            return self._next(what)["text"]
        answer = decide()
        self._post(what, answer)
        return answer

    def awaited(self, keys: Mapping[int, str], longer: float = 0.0) -> list[str]:
        """Return what processes have written under keys of the store, once all of it is there.

        Args:
            keys: The key of each process.
            longer: Seconds to wait beyond the timeout.

        Raises:
            UserError: A process has left the job because of a mistake.
            LostProcessError: A process has left for another reason, or wrote nothing in time.
        """
        deadline, pause = time.monotonic() + self.timeout + longer, 0.01
        try:
            while not self.store.check(list(keys.values())):
                if self.store.check([self._left()]):
                    self._end(json.loads(self.store.get(self._left())))
                if time.monotonic() > deadline:
                    absent = [str(rank) for rank, key in keys.items() if not self.store.check([key])]
                    which = f"process{'es' if len(absent) > 1 else ''} {', '.join(absent)}"
                    raise LostProcessError(f"{which}, which did not arrive within {self.timeout:g} s")
                time.sleep(pause)
                pause = min(0.25, 1.5 * pause)
            return [bytes(self.store.get(key)).decode() for key in keys.values()]
        except RuntimeError as error:  # also PyTorch's DistNetworkError
            raise LostProcessError(f"process 0, through which the others meet ({first_line(error)})") from error

    def compare(self, what: str, answer: Callable[[str], str], judge: Callable[[Ask], str]) -> None:
        """Let rank 0 ask all processes until it has found whether they agree.

        Args:
            what: Name of what is compared.
            answer: Returns this process's answer to a question.
            judge: Called on rank 0; returns the difference, or an empty string.

        Raises:
            UserError: They differ; the message is the same in all processes. See also `decided`.
        """
        if self.rank == 0:
            verdict = judge(lambda question: self._ask(what, question, answer))
            self._post(_END, verdict)
        else:
            while (question := self._next(what, _END))["kind"] != _END:
                self.store.set(self._key(self.rank), answer(question["text"]))
            verdict = question["text"]
        if verdict:
            self._mark_read()
            raise UserError(verdict)

    def leave(self, why: str, lost: bool, wait: bool = True) -> None:
        """Let the processes that wait for this one end, with the reason.

        Args:
            why: The reason.
            lost: True if the reason is not a mistake of the user.
            wait: If False, rank 0 has ended the others.
        """
        with suppress(RuntimeError):
            if not self.store.check([self._left()]):
                self.store.set(self._left(), json.dumps({"rank": self.rank, "why": why, "lost": lost}))
            self._mark_read(wait)

    def _end(self, left: dict[str, Any]) -> None:
        """Raise the error of a process that has left."""
        self._mark_read()
        if left["lost"]:
            raise LostProcessError(f"process {left['rank']}, which has ended: {left['why']}")
        raise UserError(f"process {left['rank']} has ended: {left['why']}")

    def _mark_read(self, wait: bool = True) -> None:
        """Record that this process ends; rank 0, which may have the store, waits for the others to do so."""
        self.store.set(self._left(self.rank), "")
        until = time.monotonic() + GRACE if wait and not self.exchanges else 0.0
        everyone = [self._left(rank) for rank in range(self.world)]
        while self.rank == 0 and time.monotonic() < until and not self.store.check(everyone):
            time.sleep(0.05)

    def _ask(self, what: str, question: str, answer: Callable[[str], str]) -> list[str]:
        self._post(what, question)
        own = answer(question)
        return [own, *self.awaited({rank: self._key(rank) for rank in range(1, self.world)})]

    def _post(self, kind: str, text: str) -> None:
        self._asked += 1
        self.store.set(self._key("question"), json.dumps({"kind": kind, "text": text}))

    def _next(self, *kinds: str) -> dict[str, str]:
        """Return rank 0's next question or decision, which is one of these kinds."""
        self._asked += 1
        question: dict[str, str] = json.loads(self.awaited({0: self._key("question")}, longer=GRACE)[0])
        if question["kind"] not in kinds:
            raise UserError(
                f"process {self.rank} has come to {kinds[0]}, but process 0 to {question['kind']}. Start all processes "
                "with the same command."
            )
        return question

    def _key(self, what: object) -> str:
        return f"run {self._run}/{self._asked}/{what}"

    def _left(self, reader: object = "") -> str:
        return f"run {self._run}/left/{reader}"
