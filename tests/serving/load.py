"""Load on a server, from threads that each ask again at once; and the memory of its processes meanwhile."""

import itertools
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.serving import pictures
from tests.serving.server import Running

KINDS = ("grey.png", "colour.jpg", "large.jpg", "clear.png", "moving.gif", "turned.jpg")
EVERY = 20
"""Each of so many uploads is a truncated JPEG, which must be refused with 422."""


@dataclass
class Load:
    """What happened.

    Attributes:
        seconds: Of each request that was answered as it should be.
        wrong: Answers and errors that should not be.
        elapsed: Seconds from the first request to the last answer.
        memory: `memory_of` each process at each time that it was measured.
    """

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    elapsed: float = 0.0
    memory: list[dict[int, tuple[int, int]]] = field(default_factory=list)

    def __str__(self) -> str:
        times = sorted(self.seconds)
        middle, high = times[len(times) // 2], times[int(0.99 * len(times))]
        total = f"{len(times):,} requests, {len(times) / self.elapsed:.0f} a second"
        return f"{total}; median {1000 * middle:.0f} ms, 99 % within {1000 * high:.0f} ms; {len(self.wrong)} failed"


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes of a process that are in memory (RSS), and those that it shares with no other (USS)."""
    words = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    sizes = {line[0]: 1024 * int(line[1]) for line in words if line[-1] == "kB"}
    return sizes["Rss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"]


def hammer(server: Running, seconds: float, threads: int, measure_every: float = 5.0) -> Load:
    """Asks for predictions for a while, at most 100,000 times.

    Args:
        server: Whom to ask.
        seconds: For how long.
        threads: How many ask at a time.
        measure_every: Seconds between two looks at the memory.
    """
    good, cut = pictures.good(), pictures.bad()["cut JPEG"][0]
    expected = {name: server.classify(good[name])[1]["classes"][0] for name in KINDS}
    load, numbers = Load(), itertools.count()
    began = time.monotonic()
    end = began + seconds

    def ask() -> None:
        while time.monotonic() < end and (number := next(numbers)) < 100_000:
            name, bad = KINDS[number % len(KINDS)], number % EVERY == 0
            start = time.monotonic()
            try:
                status, answer = server.classify(cut if bad else good[name])
            except OSError as error:
                load.wrong.append(repr(error))
                continue
            spent = time.monotonic() - start
            best = {} if status != 200 else answer["classes"][0]
            right = status == 422 if bad else best.get("name") == expected[name]["name"]
            if right and not bad:
                right = abs(best["probability"] - expected[name]["probability"]) < 1e-5
            if right:
                load.seconds.append(spent)
            else:
                load.wrong.append(f"{status} {answer}")

    asking = [threading.Thread(target=ask) for _ in range(threads)]
    for thread in asking:
        thread.start()
    while any(thread.is_alive() for thread in asking):
        time.sleep(min(measure_every, max(0.1, end - time.monotonic())))
        load.memory.append({pid: memory_of(pid) for pid in server.family()})
    load.elapsed = time.monotonic() - began
    return load
