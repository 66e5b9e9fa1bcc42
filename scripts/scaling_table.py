"""The table of docs/many_devices.md: expected scaling, derived from message sizes and assumed links, not measured.

Usage: python scripts/scaling_table.py [--bytes 20681280] [--step-ms 20 50 200]
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass

GPUS = (8, 64, 512)
NODE = 8
"""GPUs of a machine."""
BUCKETS = 2
"""All-reduces of a step: DDP's first bucket holds 1 MB, the others 25 MB."""
CHECKS = 2
"""Messages of a few bytes in each micro-batch, by which the processes agree that the loss is finite."""


@dataclass(frozen=True)
class Link:
    """The slowest cut of the ring: bytes a second through it, seconds until the first byte arrives.

    Inside a machine that is a GPU's NVLink; between machines all network cards of one, since the ring leaves a machine
    once for each card.
    """

    bandwidth: float
    latency: float


REACHED = 0.5
"""Share of the nominal bandwidth that messages of this size are assumed to reach."""
NVLINK = Link(REACHED * 450e9, 5e-6)
NETWORKS = {"8 x 400 Gb/s": Link(REACHED * 8 * 50e9, 10e-6), "1 x 100 Gb/s": Link(REACHED * 12.5e9, 20e-6)}


def all_reduce(size: float, gpus: int, link: Link) -> float:
    """Seconds of the faster of a ring and a tree; both send 2 (n - 1) / n of the message."""
    hops = min(2 * (gpus - 1), 2 * math.ceil(math.log2(gpus)))
    return 2 * (gpus - 1) / gpus * size / link.bandwidth + hops * link.latency


def exchange(size: float, gpus: int, network: Link) -> float:
    """Seconds of a step's messages, on the slowest link; none of it hidden behind the backward pass."""
    link = NVLINK if gpus <= NODE else network
    first = min(size, 2**20)
    sizes = [first, size - first][:BUCKETS] + [4] * CHECKS
    return sum(all_reduce(each, gpus, link) for each in sizes)


def rows(size: float, steps: Iterable[float]) -> list[list[str]]:
    """GPUs, network, milliseconds of the exchange, and the efficiency for each step time in milliseconds."""
    table = []
    for gpus in GPUS:
        for name, network in NETWORKS.items() if gpus > NODE else [("NVLink", NVLINK)]:
            time = 1e3 * exchange(size, gpus, network)
            table.append([f"{gpus}", name, f"{time:.2f}", *(f"{100 * step / (step + time):.1f} %" for step in steps)])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=20_681_280, help="gradients of a step (exchange/bytes_per_step)")
    parser.add_argument("--step-ms", type=float, nargs="+", default=[20, 50, 200], help="times of a step on one GPU")
    given = parser.parse_args()
    print("| GPUs | link | exchange, ms |" + "".join(f" {step:g} ms |" for step in given.step_ms))
    print("|---:|---|---:|" + "---:|" * len(given.step_ms))
    for row in rows(given.bytes, given.step_ms):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
